//! How far the kernels may be from the goldens, which are f32: they hold weights, activations and their gradients in
//! bf16. Bounds are absolute where nothing else is said.
//!
//! Given with the goldens: 0.3 for a logit, 0.03 for a loss, which is a mean over tokens (the libraries' own bf16, in
//! `forward_bf16.safetensors` and `bf16_autocast_num_items`, is within half of these). The others follow. A rounding
//! errs by up to 2^-9 of the value, half of that on the average; some ten of them per layer lie on the way of a value,
//! so that behind two to four layers it errs by 1 to 1.5 % of its size, independently of its neighbours. What was found
//! on the goldens at hand is at most two thirds of a bound, mostly a tenth to a third; a mask, factor or order that is
//! wrong errs by the size of the quantity itself.

/// Of a logit, the rounding of the logit itself (2^-6 below 8) included.
pub const LOGIT: f64 = 0.3;

/// Of a mean of log-probs: of a loss, of a completion's average.
pub const LOSS: f64 = 0.03;

/// Of one log-prob: a logit, less a mean of logits whose own error is small beside it.
pub const LOGPROB: f64 = LOGIT;

/// Of the residual stream, relative to its largest value: four times the 1.5 %, which are relative to each value.
pub const HIDDEN: f64 = 0.06;

/// Relative, of the norm of a supervised gradient, and the norm of its error: the backward pass has as many roundings
/// as the forward pass, so 2 to 3 %; twice that.
pub const GRADIENT: f64 = 0.06;

/// The same of the worst single tensor.
pub const TENSOR: f64 = 0.1;

/// The same for preferences, all three: a pair's gradient is proportional to sigmoid(-margin), which errs beside by
/// beta times what the margin does.
pub const PREFERENCE_GRADIENT: f64 = 0.15;

/// Of a trained adapter: mean error relative to the mean way from where training started. A step of Adam is
/// g / sqrt(v), so it errs as the gradient does, but where a gradient is mostly noise.
pub const ADAPTER: f64 = 0.1;

/// Of log-probs summed over up to so many tokens: each as in a loss, a few together as one.
pub fn of_a_sum(tokens: usize) -> f64 {
    LOGPROB.max(LOSS * tokens as f64)
}

/// Of a preference loss with completions of up to so many tokens. Let a single log-prob err by 0.03 (root mean square):
/// sums over a completion do by 0.03 sqrt(tokens), the margin of four sums by twice that, the loss, whose slope is
/// beta / 2, by beta * 0.03 sqrt(tokens). Twice that, and no less than any loss.
pub fn of_a_preference_loss(beta: f64, tokens: usize) -> f64 {
    LOSS.max(2.0 * beta * 0.03 * (tokens as f64).sqrt())
}
