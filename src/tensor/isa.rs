//! Which instructions this process uses, and how one body of code is compiled for each of them.

use std::sync::OnceLock;

/// An instruction set for which there is code. All of them give the same f32 results, bit for bit
/// (the bits of a NaN aside); with bf16 weights all but the first do, whose products round in their own way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// AVX-512 with the bf16 dot product.
    Avx512Bf16,
    /// AVX-512 without it.
    Avx512,
    /// AVX2 and FMA.
    Avx2,
    /// Plain Rust: NEON on aarch64 through the compiler; correct but slow on x86 without FMA.
    Portable,
}

impl Isa {
    /// The word for it in logs and benchmarks.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Avx512Bf16 => "avx512 + bf16",
            Isa::Avx512 => "avx512",
            Isa::Avx2 => "avx2 + fma",
            Isa::Portable => "portable",
        }
    }

    /// The best one this machine has. Asked once.
    pub fn best() -> Isa {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Isa::available()[0])
    }

    /// All that this machine can run, best first; never empty.
    pub fn available() -> Vec<Isa> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if avx512 && is_x86_feature_detected!("avx512bf16") {
                found.push(Isa::Avx512Bf16);
            }
            if avx512 {
                found.push(Isa::Avx512);
            }
            if avx2 {
                found.push(Isa::Avx2);
            }
        }
        found.push(Isa::Portable);
        found
    }
}

/// Defines a function whose body is compiled once per instruction set, with the set as first
/// argument. The body must call nothing that is not inlined, or that part misses the instructions.
/// Floating-point operations are never reordered by the compiler, so all versions agree bit for bit.
macro_rules! by_isa {
    ($(#[$attr:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$attr])*
        $vis fn $name(isa: $crate::tensor::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            fn avx512($($arg: $ty),*) $(-> $ret)? {
                body($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $ty),*) $(-> $ret)? {
                body($($arg),*)
            }

            match isa {
                // SAFETY: an `Isa` is made by `Isa::available`, which asked the processor.
                #[cfg(target_arch = "x86_64")]
                $crate::tensor::Isa::Avx512Bf16 | $crate::tensor::Isa::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::tensor::Isa::Avx2 => unsafe { avx2($($arg),*) },
                _ => body($($arg),*),
            }
        }
    };
}
pub(crate) use by_isa;
