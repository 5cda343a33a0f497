//! What replies were like, to tell what others like them will take.

use super::reply::Completion;

/// What replies were like.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Replies {
    /// Those that say what they took; no others are summed up.
    pub count: u64,
    /// The most tokens their prompts can have had, as it was reckoned before they were sent.
    pub prompt_bound: u64,
    /// What their prompts did have.
    pub prompt_tokens: u64,
    /// What their answers had.
    pub completion_tokens: u64,
}

impl Replies {
    /// Adds one, if it says what it took.
    pub fn add(&mut self, prompt_bound: u64, completion: &Completion) {
        if let Some(usage) = completion.usage {
            self.count += 1;
            self.prompt_bound += prompt_bound;
            self.prompt_tokens += usage.prompt_tokens;
            self.completion_tokens += usage.completion_tokens;
        }
    }

    /// Tokens of prompt and completion that this many requests with prompts of this many tokens at most take, if they
    /// are like these. `None` if there are none to go by.
    pub fn likely(&self, requests: u64, prompt_bound: u64) -> Option<(u64, u64)> {
        let share = |part: u64, whole: u64, of: u64| (part as f64 / whole.max(1) as f64 * of as f64).round() as u64;
        (self.count > 0).then(|| {
            let prompt = share(self.prompt_tokens, self.prompt_bound, prompt_bound);
            (prompt, share(self.completion_tokens, self.count, requests))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_tell_what_others_like_them_take() {
        let replies = Replies { count: 4, prompt_bound: 400, prompt_tokens: 100, completion_tokens: 2000 };
        assert_eq!(replies.likely(10, 2000), Some((500, 5000)));
        assert_eq!(replies.likely(0, 0), Some((0, 0)));
        assert_eq!(Replies::default().likely(10, 2000), None);
    }
}
