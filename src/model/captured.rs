//! Training steps on a CUDA device, and those that come again in the same shape: captured the second time, from then on
//! one graph for the forward pass and one for the backward pass.
//!
//! What differs from one step of a shape to the next is what it is given ([`Inputs`]), which lies in one buffer that is
//! written before a launch. All graphs work in one [`Region`], so that of all shapes only the largest takes memory: a step
//! has the model to itself from its forward pass to its backward pass. The region is made where there is room for it and
//! for a step beside it, and given back, for good, before a step that may need its memory: nothing fails for the sake of
//! graphs.
//!
//! Not captured are steps with `offload`, whose copies run in another queue.

use super::batch::{Batch, Extent};
use super::decoder::{Decoder, Tape};
use super::device::Cuda;
use super::fit;
use super::parameter::Gradients;
use super::place::{Inputs, Place};
use super::policy::{Policy, Recompute};
use crate::cuda::{Buffer, Gpu, Graph, Region};
use crate::problem::Problem;
use half::bf16;
use std::collections::HashMap;
use std::sync::Arc;

/// Shapes that are captured at most: each takes two graphs' worth of the driver's memory.
pub const MOST_CAPTURED: usize = 64;
/// Shapes that are remembered at most.
const MOST_KNOWN: usize = 4096;

/// A model on a device, and what its training needs there.
pub struct DeviceSide {
    /// The model.
    pub model: Decoder<Cuda>,
    /// How steps go about their work.
    pub policy: Policy,
    /// A sum for each trained tensor, once there is something to add.
    gradients: Option<Gradients<Buffer<f32>>>,
    steps: Steps,
}

/// What the backward pass needs of the forward pass.
pub struct DeviceTape {
    given: Given,
    pass: Forward,
}

enum Forward {
    /// Launched kernel by kernel.
    Launched(Box<Tape<Cuda>>),
    /// Captured, and launched as a whole.
    Captured(Box<Half>),
    /// Launched as a whole.
    Again(Box<Step>),
}

/// A batch on the host.
struct Given {
    ids: Vec<u32>,
    lengths: Vec<usize>,
    rows: Vec<usize>,
    targets: Vec<u32>,
}

/// What a step is captured for: whatever sizes, grids and addresses depend on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Shape {
    lengths: Vec<usize>,
    rows: usize,
    adapter_on: bool,
}

/// A captured forward pass.
struct Half {
    region: Arc<Region>,
    tape: Tape<Cuda>,
    /// A view of the region.
    logprobs: Buffer<f32>,
    forward: Graph,
}

/// A captured step. Its buffers are views of the region.
struct Step {
    region: Arc<Region>,
    inputs: Inputs<Cuda>,
    logprobs: Buffer<f32>,
    forward: Graph,
    backward: Graph,
    /// What the backward pass returns.
    dx: Option<Buffer<bf16>>,
}

/// The captured steps of a model.
#[derive(Default)]
struct Steps {
    region: Option<Arc<Region>>,
    shapes: Shapes<Box<Step>>,
    /// Bytes of the largest step so far.
    most: usize,
    /// Whether memory has been short.
    off: bool,
}

/// What is known of shapes, with an `S` of each that is captured.
struct Shapes<S> {
    known: HashMap<Shape, Known<S>>,
    /// Steps so far, as a clock.
    now: u64,
}

struct Known<S> {
    /// When it came last.
    last: u64,
    /// Whether capturing it has failed.
    refused: bool,
    captured: Option<S>,
}

impl Given {
    fn of(batch: &Batch) -> Given {
        let (ids, lengths) = (batch.ids.to_vec(), batch.lengths.to_vec());
        Given { ids, lengths, rows: batch.rows.to_vec(), targets: batch.targets.to_vec() }
    }

    fn batch(&self) -> Batch<'_> {
        Batch { ids: &self.ids, lengths: &self.lengths, rows: &self.rows, targets: &self.targets }
    }

    fn shape(&self, model: &Decoder<Cuda>) -> Shape {
        Shape { lengths: self.lengths.clone(), rows: self.rows.len(), adapter_on: model.adapter_on }
    }

    /// Says what was under way when a graph failed; which kernel it was the driver does not tell.
    fn named(&self, done: Result<(), Problem>) -> Result<(), Problem> {
        let Extent { tokens, rows, sequences, .. } = Extent::of(&self.batch());
        done.map_err(|problem| {
            problem
                .note(format!("a captured step: sequences {sequences}, tokens {tokens}, learned {rows}"))
                .help("CUDA_LAUNCH_BLOCKING=1 has kernels launched one by one, so that the one that fails is named")
        })
    }
}

impl DeviceSide {
    /// A model that has been moved.
    pub fn new(model: Decoder<Cuda>, policy: Policy) -> DeviceSide {
        DeviceSide { model, policy, gradients: None, steps: Steps::default() }
    }

    /// The sums of gradients, zero if nothing was added yet.
    pub fn gradients(&mut self) -> Result<&mut Gradients<Buffer<f32>>, Problem> {
        Ok(self.parts()?.1)
    }

    /// The model, and its gradients.
    pub fn parts(&mut self) -> Result<(&mut Decoder<Cuda>, &mut Gradients<Buffer<f32>>), Problem> {
        let gradients = match self.gradients.take() {
            Some(gradients) => gradients,
            None => self.model.zero_gradients()?,
        };
        Ok((&mut self.model, self.gradients.insert(gradients)))
    }

    /// Log-probs of the batch's targets, and what [`DeviceSide::backward`] needs.
    pub fn forward(&mut self, batch: &Batch) -> Result<(Vec<f32>, DeviceTape), Problem> {
        batch.check();
        let given = Given::of(batch);
        let captures = self.policy.graphs && !self.policy.offload && self.model.gpu().driver().captures();
        let shape = captures.then(|| given.shape(&self.model));
        if let Some(mut step) = shape.as_ref().and_then(|shape| self.steps.shapes.take(shape)) {
            step.inputs.write(batch)?;
            given.named(step.forward.launch())?;
            let logprobs = step.logprobs.download()?;
            return Ok((logprobs, DeviceTape { given, pass: Forward::Again(step) }));
        }
        let policy = self.decided(Extent::of(batch))?;
        if let Some(shape) = &shape {
            let bytes =
                fit::region_bytes(&self.model, policy, Extent::of(batch), fit::kept(&self.model, policy.recompute));
            if let Some(region) = self.steps.room(self.model.gpu(), shape, bytes)? {
                if let Some(half) = self.capture_forward(batch, region, policy)? {
                    given.named(half.forward.launch())?;
                    let logprobs = half.logprobs.download()?;
                    return Ok((logprobs, DeviceTape { given, pass: Forward::Captured(Box::new(half)) }));
                }
                self.steps.refuse(shape);
            }
        }
        let (logprobs, tape) = self.launch_forward(batch, policy)?;
        Ok((logprobs, DeviceTape { given, pass: Forward::Launched(Box::new(tape)) }))
    }

    /// Adds to the gradients that of `sum_r dlogprobs[r] * logprobs[r]`.
    pub fn backward(&mut self, tape: DeviceTape, dlogprobs: &[f32]) -> Result<(), Problem> {
        let DeviceTape { given, pass } = tape;
        match pass {
            Forward::Launched(tape) => self.launch_backward(*tape, &given, dlogprobs),
            Forward::Again(step) => self.launch_step(step, &given, dlogprobs),
            Forward::Captured(half) => match self.capture_backward(*half, &given)? {
                Some(step) => self.launch_step(step, &given, dlogprobs),
                None => {
                    self.steps.refuse(&given.shape(&self.model));
                    let policy = match self.policy.recompute {
                        Recompute::Fit => Policy { recompute: Recompute::All, ..self.policy },
                        _ => self.policy,
                    };
                    let (_, tape) = self.launch_forward(&given.batch(), policy)?;
                    self.launch_backward(tape, &given, dlogprobs)
                }
            },
        }
    }

    fn decided(&self, extent: Extent) -> Result<Policy, Problem> {
        Ok(match self.policy.recompute {
            Recompute::Fit => {
                let recompute = fit::on_device(&self.model, self.policy, self.model.gpu(), extent)?;
                Policy { recompute, ..self.policy }
            }
            _ => self.policy,
        })
    }

    fn launch_forward(&self, batch: &Batch, policy: Policy) -> Result<(Vec<f32>, Tape<Cuda>), Problem> {
        let (inputs, extent) = self.model.inputs(batch)?;
        let (logprobs, tape) = self.model.forward_pass(inputs, extent, policy)?;
        Ok((logprobs.download()?, tape))
    }

    fn launch_backward(&mut self, mut tape: Tape<Cuda>, given: &Given, dlogprobs: &[f32]) -> Result<(), Problem> {
        let (model, gradients) = self.parts()?;
        model.place.slopes(&mut tape.inputs, dlogprobs)?;
        match model.backward_pass(tape, &mut gradients.values)? {
            Some(dx) => model.embed_backward(&dx, &given.ids, &mut gradients.values),
            None => Ok(()),
        }
    }

    /// `None` if the memory does not suffice, or the driver refuses.
    fn capture_forward(&self, batch: &Batch, region: Arc<Region>, policy: Policy) -> Result<Option<Half>, Problem> {
        let (model, extent) = (&self.model, Extent::of(batch));
        let angles = model.place.angles(&model.config, extent.longest)?;
        let Some(whole) = unless_refused(region.alloc(Inputs::<Cuda>::len(extent)))? else { return Ok(None) };
        let mut inputs = Inputs::over(whole, extent, angles);
        inputs.write(batch)?;
        let mut passed = None;
        let graph = model.gpu().capture_in(&region, || {
            passed = Some(model.forward_pass(inputs, extent, policy)?);
            Ok(())
        });
        let done = unless_refused(graph)?.zip(passed);
        Ok(done.map(|(forward, (logprobs, tape))| Half { logprobs: region.view(&logprobs), region, tape, forward }))
    }

    /// `None` if the memory does not suffice, or the driver refuses.
    fn capture_backward(&mut self, half: Half, given: &Given) -> Result<Option<Box<Step>>, Problem> {
        let Half { region, tape, logprobs, forward } = half;
        let inputs = tape.inputs.view(&region, Extent::of(&given.batch()));
        let (model, gradients) = self.parts()?;
        let mut dx = None;
        let backward = model.gpu().capture_in(&region, || {
            dx = model.backward_pass(tape, &mut gradients.values)?;
            Ok(())
        });
        let Some(backward) = unless_refused(backward)? else { return Ok(None) };
        let dx = dx.map(|dx| region.view(&dx));
        Ok(Some(Box::new(Step { region, inputs, logprobs, forward, backward, dx })))
    }

    /// The backward pass of a captured step, which is kept for the next time.
    fn launch_step(&mut self, mut step: Box<Step>, given: &Given, dlogprobs: &[f32]) -> Result<(), Problem> {
        let (model, gradients) = self.parts()?;
        model.place.slopes(&mut step.inputs, dlogprobs)?;
        given.named(step.backward.launch())?;
        if let Some(dx) = &step.dx {
            model.embed_backward(dx, &given.ids, &mut gradients.values)?;
        }
        let shape = given.shape(&self.model);
        self.steps.keep(shape, step);
        Ok(())
    }
}

/// `None` in place of a problem that a step launched kernel by kernel need not have.
fn unless_refused<T>(done: Result<T, Problem>) -> Result<Option<T>, Problem> {
    match done {
        Err(problem) if ["cuda::capture", "cuda::out_of_memory", "cuda::driver"].contains(&problem.code) => Ok(None),
        done => done.map(Some),
    }
}

impl Steps {
    /// Where to capture a step of this shape, which takes at most this many bytes; `None` if it is to be launched kernel
    /// by kernel.
    fn room(&mut self, gpu: &Gpu, shape: &Shape, bytes: usize) -> Result<Option<Arc<Region>>, Problem> {
        if self.off {
            return Ok(None);
        }
        self.most = self.most.max(bytes);
        let worth_it = self.shapes.note(shape);
        if self.region.is_none() && !worth_it {
            return Ok(None);
        }
        let (free, total) = gpu.driver().memory()?;
        let free = free + gpu.usage().pooled;
        if self.region.is_some() && free < bytes {
            *self = Steps { off: true, ..Steps::default() };
            return Ok(None);
        }
        if worth_it { self.region(gpu, bytes, free, total) } else { Ok(None) }
    }

    /// A region of at least this many bytes, if it leaves room for such a step beside it and a sixteenth of the device for
    /// graphs and whoever else has a little of it. One that is too small goes, and all that was captured in it.
    fn region(&mut self, gpu: &Gpu, bytes: usize, free: usize, total: usize) -> Result<Option<Arc<Region>>, Problem> {
        let there = self.region.as_ref().map_or(0, |region| region.bytes());
        if there >= bytes {
            return Ok(self.region.clone());
        }
        let fits = |bytes: &usize| 2 * bytes + total / 16 <= free + there;
        let Some(bytes) = [self.most, bytes].into_iter().find(fits) else { return Ok(None) };
        self.shapes.forget();
        self.region = None;
        self.region = unless_refused(Region::new(gpu, bytes))?;
        Ok(self.region.clone())
    }

    /// Does not try to capture it again.
    fn refuse(&mut self, shape: &Shape) {
        if let Some(known) = self.shapes.known.get_mut(shape) {
            known.refused = true;
        }
    }

    fn keep(&mut self, shape: Shape, step: Box<Step>) {
        // Not if the region has been given back meanwhile.
        if self.region.as_ref().is_some_and(|region| Arc::ptr_eq(region, &step.region)) {
            self.shapes.keep(shape, step);
        }
    }
}

impl<S> Default for Shapes<S> {
    fn default() -> Shapes<S> {
        Shapes { known: HashMap::new(), now: 0 }
    }
}

impl<S> Shapes<S> {
    /// What is captured of a shape, if anything is.
    fn take(&mut self, shape: &Shape) -> Option<S> {
        let known = self.known.get_mut(shape)?;
        let captured = known.captured.take()?;
        self.now += 1;
        known.last = self.now;
        Some(captured)
    }

    /// Notes that a shape of which nothing is captured has come. Whether it is to be: if it came before, and there is a
    /// place, or the one that was not used for longest has not been used since it came before. Among more shapes than
    /// there are places each would otherwise lose its own before it comes again.
    fn note(&mut self, shape: &Shape) -> bool {
        self.now += 1;
        if let Some(known) = self.known.get_mut(shape) {
            let before = std::mem::replace(&mut known.last, self.now);
            let free = self.captured().count() < MOST_CAPTURED;
            return !self.known[shape].refused && (free || self.captured().any(|known| known.last < before));
        }
        if self.known.len() >= MOST_KNOWN {
            let idle = self.known.iter().filter(|(_, known)| known.captured.is_none());
            let oldest = idle.min_by_key(|(_, known)| known.last).map(|(shape, _)| shape.clone());
            oldest.and_then(|oldest| self.known.remove(&oldest));
        }
        self.known.insert(shape.clone(), Known { last: self.now, refused: false, captured: None });
        false
    }

    /// Keeps what is captured of a shape that has come, in a free place or in that of the one that was not used for
    /// longest.
    fn keep(&mut self, shape: Shape, captured: S) {
        let oldest = self.captured().map(|known| known.last).min();
        if let Some(oldest) = oldest.filter(|_| self.captured().count() >= MOST_CAPTURED) {
            self.known.values_mut().filter(|known| known.last == oldest).for_each(|known| known.captured = None);
        }
        let last = self.now;
        let known = self.known.entry(shape).or_insert(Known { last, refused: false, captured: None });
        known.captured = Some(captured);
    }

    fn captured(&self) -> impl Iterator<Item = &Known<S>> {
        self.known.values().filter(|known| known.captured.is_some())
    }

    fn forget(&mut self) {
        self.known.values_mut().for_each(|known| known.captured = None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(tokens: usize) -> Shape {
        Shape { lengths: vec![tokens], rows: 1, adapter_on: true }
    }

    /// Steps of these shapes, one after the other. Returns how many were captured before.
    fn steps(shapes: &mut Shapes<usize>, tokens: impl Iterator<Item = usize>) -> usize {
        let mut again = 0;
        for tokens in tokens {
            let shape = shape(tokens);
            match shapes.take(&shape) {
                Some(captured) => {
                    assert_eq!(captured, tokens);
                    again += 1;
                    shapes.keep(shape, captured);
                }
                None if shapes.note(&shape) => shapes.keep(shape, tokens),
                None => {}
            }
            assert!(shapes.captured().count() <= MOST_CAPTURED && shapes.known.len() <= MOST_KNOWN);
        }
        again
    }

    #[test]
    fn a_shape_is_captured_when_it_comes_again() {
        let mut shapes = Shapes::default();
        assert_eq!(steps(&mut shapes, [1, 2, 1, 3, 1, 2, 2, 1].into_iter()), 3);
        shapes.forget();
        assert_eq!(steps(&mut shapes, [1, 1].into_iter()), 1, "known it still is");
        shapes.known.get_mut(&shape(3)).unwrap().refused = true;
        assert_eq!(steps(&mut shapes, [3, 3, 3].into_iter()), 0);
    }

    #[test]
    fn among_more_shapes_than_places_those_that_have_one_keep_it_while_they_come() {
        let mut shapes = Shapes::default();
        let epoch = || 0..2 * MOST_CAPTURED;
        assert_eq!(steps(&mut shapes, epoch()), 0);
        assert_eq!(steps(&mut shapes, epoch()), 0, "the first of them are captured");
        for _ in 0..3 {
            assert_eq!(steps(&mut shapes, epoch()), MOST_CAPTURED);
        }
        // Those that come no more make room.
        let other = || 1000..1000 + MOST_CAPTURED;
        assert_eq!(steps(&mut shapes, other().chain(other())), 0);
        assert_eq!(steps(&mut shapes, other()), MOST_CAPTURED);
    }

    #[test]
    fn shapes_that_never_come_again_are_forgotten() {
        let mut shapes = Shapes::default();
        assert_eq!(steps(&mut shapes, [0, 0].into_iter().chain(1..2 * MOST_KNOWN)), 0);
        assert_eq!(shapes.known.len(), MOST_KNOWN);
        assert_eq!(steps(&mut shapes, [0].into_iter()), 1, "but not what is captured");
    }
}
