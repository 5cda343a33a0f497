//! What is said of an answer.

/// Whether an answer is right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is.
    Correct,
    /// It is not, or there is none.
    Wrong,
    /// Not settled by any rule here.
    Undecided,
}

impl Verdict {
    /// As results have it: `correct`, `wrong` or `undecided`.
    pub fn name(self) -> &'static str {
        match self {
            Verdict::Correct => "correct",
            Verdict::Wrong => "wrong",
            Verdict::Undecided => "undecided",
        }
    }
}

/// What kind of answer the gold one is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Anything a mathematics problem may have as its answer.
    Math,
    /// A number or expression; the gold answer must be one.
    Number,
    /// A letter.
    Choice,
}

/// What came of grading a response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Graded {
    /// Whether it is right.
    pub verdict: Verdict,
    /// What was taken for the answer; `None` if there was none.
    pub extracted: Option<String>,
    /// The rule that found it: `box`, `boxes`, `mark`, `bold`, `formula`, `last line`, `start`, or `none`.
    pub found: &'static str,
    /// The rule that decided.
    pub rule: &'static str,
}

/// A verdict and the rule that reached it.
pub type Ruling = (Verdict, &'static str);
