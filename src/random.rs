//! Counter-based random numbers: a number is a function of (seed, stream, counter), so no draw
//! depends on how many were made before, by whom, or on which thread.
//!
//! Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC11).

/// One block of Philox4x32-10.
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key[0] = key[0].wrapping_add(0x9E37_79B9);
            key[1] = key[1].wrapping_add(0xBB67_AE85);
        }
        let a = 0xD251_1F53_u64 * u64::from(counter[0]);
        let b = 0xCD9E_8D57_u64 * u64::from(counter[2]);
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
    }
    counter
}

/// The numbers of one (seed, stream). `stream` keeps uses apart: hash a name and an index into it.
#[derive(Debug, Clone, Copy)]
pub struct Stream {
    seed: u64,
    stream: u64,
}

impl Stream {
    /// Two streams of one seed have nothing to do with one another.
    pub fn new(seed: u64, stream: u64) -> Stream {
        Stream { seed, stream }
    }

    /// A stream known by words, for example `named(seed, &["shuffle", "epoch 3"])`.
    pub fn named(seed: u64, words: &[&str]) -> Stream {
        let mut encoder = crate::digest::Encoder::new("stream");
        for word in words {
            encoder.field(word.as_bytes());
        }
        let bytes = encoder.finish();
        let mut first = [0; 8];
        first.copy_from_slice(&bytes.as_bytes()[..8]);
        Stream::new(seed, u64::from_le_bytes(first))
    }

    /// Four u32 at `counter`.
    pub fn block(&self, counter: u64) -> [u32; 4] {
        philox(
            [counter as u32, (counter >> 32) as u32, self.stream as u32, (self.stream >> 32) as u32],
            [self.seed as u32, (self.seed >> 32) as u32],
        )
    }

    /// 64 random bits.
    pub fn u64(&self, counter: u64) -> u64 {
        let block = self.block(counter);
        u64::from(block[0]) | u64::from(block[1]) << 32
    }

    /// Uniform in [0, 1), 53 bits.
    pub fn uniform(&self, counter: u64) -> f64 {
        (self.u64(counter) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal (Box-Muller on one block).
    pub fn normal(&self, counter: u64) -> f64 {
        let block = self.block(counter);
        let first = (f64::from(block[0]) + 1.0) / 4_294_967_297.0;
        let second = f64::from(block[1]) / 4_294_967_296.0;
        (-2.0 * first.ln()).sqrt() * (std::f64::consts::TAU * second).cos()
    }

    /// A permutation of `0..n` (Fisher-Yates, without modulo bias that matters below 2^32).
    pub fn permutation(&self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            let wide = u128::from(self.u64(i as u64)) * (i as u128 + 1);
            order.swap(i, (wide >> 64) as usize);
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of Random123's kat_vectors.
    #[test]
    fn philox_gives_the_published_known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    }

    #[test]
    fn a_permutation_holds_every_index_once() {
        let mut order = Stream::named(7, &["test"]).permutation(1000);
        order.sort_unstable();
        assert_eq!(order, (0..1000).collect::<Vec<_>>());
    }
}
