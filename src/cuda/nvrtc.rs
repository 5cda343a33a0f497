//! NVRTC, NVIDIA's compiler as a library: the functions we need of it. `cargo xtask kernels` includes this file.

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};

type Code = c_int;
type Program = *mut c_void;
type Size = unsafe extern "C" fn(Program, *mut usize) -> Code;
type Text = unsafe extern "C" fn(Program, *mut c_char) -> Code;

/// The compiler, opened.
pub struct Nvrtc {
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Code,
    destroy: unsafe extern "C" fn(*mut Program) -> Code,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Code,
    error_string: unsafe extern "C" fn(Code) -> *const c_char,
    log: (Size, Text),
    ptx: (Size, Text),
    cubin: (Size, Text),
    /// The functions above are in there.
    _libraries: (Library, Option<Library>),
}

/// What came of one compilation.
pub struct Output {
    /// The cubin or the PTX.
    pub bytes: Vec<u8>,
    /// Warnings, and `ptxas` on registers and memory.
    pub log: String,
}

impl Nvrtc {
    /// The library in `folder` or where a wheel or a toolkit has it below `folder`.
    pub fn open(folder: &Path) -> Result<Nvrtc, String> {
        // NVRTC opens its built-in headers by bare name: they have to be there before, for all to see.
        let builtins = library(&find(folder, "libnvrtc-builtins.so")?)?;
        Nvrtc::of(library(&find(folder, "libnvrtc.so")?)?, Some(builtins))
    }

    /// The functions of an opened library, whose built-in headers are open or will be found by it.
    pub fn of(compiler: Library, builtins: Option<Library>) -> Result<Nvrtc, String> {
        // SAFETY: the types are those of nvrtc.h, the same since CUDA 11.1; the libraries stay open as long
        // as the struct lives.
        unsafe {
            Ok(Nvrtc {
                create: symbol(&compiler, "nvrtcCreateProgram")?,
                destroy: symbol(&compiler, "nvrtcDestroyProgram")?,
                compile: symbol(&compiler, "nvrtcCompileProgram")?,
                error_string: symbol(&compiler, "nvrtcGetErrorString")?,
                log: (symbol(&compiler, "nvrtcGetProgramLogSize")?, symbol(&compiler, "nvrtcGetProgramLog")?),
                ptx: (symbol(&compiler, "nvrtcGetPTXSize")?, symbol(&compiler, "nvrtcGetPTX")?),
                cubin: (symbol(&compiler, "nvrtcGetCUBINSize")?, symbol(&compiler, "nvrtcGetCUBIN")?),
                _libraries: (compiler, builtins),
            })
        }
    }

    /// `12.9.86`: the library's own function leaves out the last number, the PTX it writes does not.
    pub fn version(&self) -> Result<String, String> {
        let nothing = BTreeMap::from([("version.cu".to_string(), "extern \"C\" __global__ void f() {}\n".to_string())]);
        let output = self.compile("version.cu", &nothing, &["--gpu-architecture=compute_80".to_string()], true)?;
        let text = String::from_utf8_lossy(&output.bytes).into_owned();
        let version =
            text.lines().find_map(|line| line.split_once(", V").map(|(_, version)| version.trim().to_string()));
        version.ok_or_else(|| format!("NVRTC's PTX does not name its version:\n{text}"))
    }

    /// Compiles `file`, which is one of `sources`; the others are what it may include. `Err` is the log.
    pub fn compile(
        &self,
        file: &str,
        sources: &BTreeMap<String, String>,
        options: &[String],
        ptx: bool,
    ) -> Result<Output, String> {
        let c = |text: &str| CString::new(text).map_err(|_| format!("{file}: a zero byte in its text or options"));
        let source = c(&sources[file])?;
        let name = c(file)?;
        let headers = sources.iter().filter(|(name, _)| *name != file);
        let (names, texts): (Vec<_>, Vec<_>) = headers.map(|(name, text)| (c(name), c(text))).unzip();
        let names = names.into_iter().collect::<Result<Vec<_>, _>>()?;
        let texts = texts.into_iter().collect::<Result<Vec<_>, _>>()?;
        let options = options.iter().map(|option| c(option)).collect::<Result<Vec<_>, _>>()?;
        let pointers = |list: &[CString]| list.iter().map(|text| text.as_ptr()).collect::<Vec<_>>();
        let (name_pointers, text_pointers, option_pointers) = (pointers(&names), pointers(&texts), pointers(&options));

        let mut program = std::ptr::null_mut();
        // SAFETY: all strings end with a zero byte and outlive the call, which copies them.
        self.done(unsafe {
            (self.create)(
                &mut program,
                source.as_ptr(),
                name.as_ptr(),
                text_pointers.len() as c_int,
                text_pointers.as_ptr(),
                name_pointers.as_ptr(),
            )
        })?;
        // SAFETY: the program was made above; the options outlive the call.
        let code = unsafe { (self.compile)(program, option_pointers.len() as c_int, option_pointers.as_ptr()) };
        let log = self.take(program, self.log).map(text);
        let result = self.done(code).and_then(|()| self.take(program, if ptx { self.ptx } else { self.cubin }));
        // SAFETY: made above, not used afterwards.
        unsafe { (self.destroy)(&mut program) };
        let log = log?;
        match result {
            Ok(bytes) => Ok(Output { bytes, log }),
            Err(error) => Err(format!("{error}\n{}", log.trim_end())),
        }
    }

    fn done(&self, code: Code) -> Result<(), String> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: a constant of the library for every code.
        Err(unsafe { CStr::from_ptr((self.error_string)(code)) }.to_string_lossy().into_owned())
    }

    /// One of the results that are asked for by size first.
    fn take(&self, program: Program, (size, read): (Size, Text)) -> Result<Vec<u8>, String> {
        let mut bytes = 0;
        // SAFETY: `program` is alive and was compiled.
        self.done(unsafe { size(program, &mut bytes) })?;
        let mut buffer = vec![0u8; bytes];
        // SAFETY: as large as the library just said.
        self.done(unsafe { read(program, buffer.as_mut_ptr().cast()) })?;
        Ok(buffer)
    }
}

/// Without the zero byte that ends the library's texts.
pub fn text(bytes: Vec<u8>) -> String {
    String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_string()
}

/// Opens a library by path, or by name where the system looks for it.
pub fn library(name: &Path) -> Result<Library, String> {
    // SAFETY: NVIDIA's libraries; opening them runs nothing that we depend on.
    let opened = unsafe { Library::open(Some(name), RTLD_NOW | RTLD_GLOBAL) };
    opened.map_err(|error| format!("cannot open {}: {error}", name.display()))
}

/// # Safety
/// `T` must be the function's type, and must not be called once the library is closed.
unsafe fn symbol<T: Copy>(library: &Library, name: &str) -> Result<T, String> {
    // SAFETY: the caller's promise.
    unsafe { library.get::<T>(name.as_bytes()) }.map(|symbol| *symbol).map_err(|error| format!("{name}: {error}"))
}

fn find(folder: &Path, name: &str) -> Result<PathBuf, String> {
    let places = ["", "lib", "lib64", "nvidia/cuda_nvrtc/lib", "nvidia/cu13/lib"];
    let in_place = |place: &&str| {
        let files = std::fs::read_dir(folder.join(place)).ok()?.flatten();
        files.map(|entry| entry.path()).find(|path| path.file_name().is_some_and(|file| starts(file, name)))
    };
    places.iter().find_map(in_place).ok_or_else(|| format!("no {name}* in {}", folder.display()))
}

fn starts(file: &std::ffi::OsStr, name: &str) -> bool {
    file.to_string_lossy().starts_with(name)
}
