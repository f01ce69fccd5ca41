//! Choice of the instruction set at run time.
use std::cell::Cell;
use std::sync::OnceLock;

/// An instruction set that kernels are compiled for, from narrow to wide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// What the compilation target guarantees (SSE2 on x86-64, NEON on AArch64).
    Portable,
    /// AVX2 with fused multiply-add.
    Avx2,
    /// AVX-512 F, BW, VL and DQ.
    Avx512,
    /// AVX-512 with dot products of bf16 pairs.
    Avx512Bf16,
}

/// Why an instruction set cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IsaError {
    /// The environment variable holds no known name.
    #[error("MISTRAL4_ISA={value:?} is not an instruction set; use portable, avx2, avx512 or avx512-bf16")]
    Unknown {
        /// The value found.
        value: String,
    },
    /// The processor lacks the instructions.
    #[error("MISTRAL4_ISA asks for {isa:?}, and this processor offers at most {best:?}")]
    Unsupported {
        /// The set asked for.
        isa: Isa,
        /// The widest set this processor has.
        best: Isa,
    },
}

thread_local! {
    static FORCED: Cell<Option<Isa>> = const { Cell::new(None) };
}

impl Isa {
    const ALL: [Isa; 4] = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16];

    /// The widest instruction set of this processor.
    pub fn best() -> Isa {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(detect)
    }

    /// Every instruction set that this processor can run, narrowest first.
    pub fn available() -> Vec<Isa> {
        Isa::ALL.into_iter().filter(|isa| *isa <= Isa::best()).collect()
    }

    /// The set named by the environment variable `MISTRAL4_ISA`, or the widest one when it is unset.
    ///
    /// # Errors
    /// The variable holds an unknown name, or names a set that this processor lacks.
    pub fn from_env() -> Result<Isa, IsaError> {
        match std::env::var("MISTRAL4_ISA") {
            Ok(value) => Isa::parse(&value),
            Err(_) => Ok(Isa::best()),
        }
    }

    fn parse(value: &str) -> Result<Isa, IsaError> {
        let isa = match value.to_ascii_lowercase().as_str() {
            "portable" => Isa::Portable,
            "avx2" => Isa::Avx2,
            "avx512" => Isa::Avx512,
            "avx512-bf16" => Isa::Avx512Bf16,
            _ => return Err(IsaError::Unknown { value: value.to_owned() }),
        };
        let best = Isa::best();
        if isa <= best { Ok(isa) } else { Err(IsaError::Unsupported { isa, best }) }
    }

    /// The set that kernels called from this thread use.
    ///
    /// A bad `MISTRAL4_ISA` is reported once on standard error and the widest set is used; programs that
    /// want to stop instead call [`Isa::from_env`] first.
    pub fn active() -> Isa {
        static DEFAULT: OnceLock<Isa> = OnceLock::new();
        FORCED.get().unwrap_or_else(|| {
            *DEFAULT.get_or_init(|| {
                Isa::from_env().unwrap_or_else(|error| {
                    eprintln!("warning: {error}; using {:?}", Isa::best());
                    Isa::best()
                })
            })
        })
    }

    /// Runs `f` with every kernel that it calls from this thread forced to this set.
    ///
    /// # Panics
    /// When this processor lacks the set.
    pub fn run<R>(self, f: impl FnOnce() -> R) -> R {
        assert!(self <= Isa::best(), "{self:?} is not available on this processor");
        struct Restore(Option<Isa>);
        impl Drop for Restore {
            fn drop(&mut self) {
                FORCED.set(self.0);
            }
        }
        let _restore = Restore(FORCED.replace(Some(self)));
        f()
    }
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Isa {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let avx512 = avx2
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq");
    match (avx2, avx512) {
        (_, true) if is_x86_feature_detected!("avx512bf16") => Isa::Avx512Bf16,
        (_, true) => Isa::Avx512,
        (true, _) => Isa::Avx2,
        _ => Isa::Portable,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Isa {
    Isa::Portable
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_forces_and_restores() {
        let outside = Isa::active();
        Isa::Portable.run(|| {
            assert_eq!(Isa::active(), Isa::Portable);
            Isa::best().run(|| assert_eq!(Isa::active(), Isa::best()));
            assert_eq!(Isa::active(), Isa::Portable);
        });
        assert_eq!(Isa::active(), outside);
    }

    #[test]
    fn names_are_parsed() {
        assert_eq!(Isa::parse("Portable"), Ok(Isa::Portable));
        assert_eq!(Isa::parse("sse9"), Err(IsaError::Unknown { value: "sse9".to_owned() }));
    }
}
