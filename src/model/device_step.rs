//! Training steps on a CUDA device, and those that come again in the same shape: captured the second time, from then on
//! one graph for the way there and one for the way back.
//!
//! What differs from one step of a shape to the next is what it is given ([`Inputs`]) and what it adds to. The former
//! lies in one buffer that is written before a launch; gradients are those it was captured for, or it is not used. All
//! graphs work in one [`Region`], so that of all shapes only the largest takes memory; between the way there and the way
//! back a [`Lease`] keeps others out of it. The region is made where there is room for it and for a step beside it, and
//! given back, for good, before a step that may need its memory: nothing fails for the sake of graphs.
//!
//! Not captured are steps with `offload`, whose copies run in another queue.

use super::device::{DeviceGradients, DeviceModel, Walk};
use super::fit;
use super::memory::Extent;
use super::qwen2::{Batch, Model, Recompute};
use crate::cuda::{Buffer, Gpu, Graph, Region};
use crate::problem::Problem;
use half::bf16;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Shapes that are captured at most: each takes two graphs' worth of the driver's memory.
pub const MOST_CAPTURED: usize = 64;
/// Shapes that are remembered at most.
const MOST_KNOWN: usize = 4096;

/// What a step is given, in the sections of one buffer.
pub(super) struct Inputs {
    all: Buffer<u32>,
    pub ids: Buffer<u32>,
    pub targets: Buffer<u32>,
    pub rows: Buffer<u32>,
    pub positions: Buffer<u32>,
    pub cu_seqlens: Buffer<i32>,
    /// Of each row's log-prob, for the way back.
    pub slopes: Buffer<f32>,
}

/// What the way back needs of the way there.
pub struct DeviceTape {
    given: Given,
    way: Way,
}

enum Way {
    /// Launched kernel by kernel.
    Launched(Box<Walk>),
    /// Captured, and launched as a whole.
    Captured(Box<Half>, Lease),
    /// Launched as a whole.
    Again(Box<Step>, Lease),
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

/// A captured way there.
struct Half {
    region: Arc<Region>,
    walk: Walk,
    /// A view of the region.
    logprobs: Buffer<f32>,
    there: Graph,
}

/// A captured step. Its buffers are views of the region, but for the sums.
struct Step {
    region: Arc<Region>,
    inputs: Inputs,
    logprobs: Buffer<f32>,
    there: Graph,
    back: Graph,
    /// What the way back returns.
    dx: Option<Buffer<bf16>>,
    /// What it adds to.
    sums: Vec<Buffer<f32>>,
}

/// Whoever has it is the only one to use the region.
struct Lease(#[expect(dead_code, reason = "it is there, or not")] Arc<()>);

/// The steps of a model.
#[derive(Default)]
pub(super) struct Steps(Mutex<All>);

#[derive(Default)]
struct All {
    region: Option<Arc<Region>>,
    /// Taken by the one that uses the region.
    lease: Arc<()>,
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

impl Inputs {
    /// Where a section of `count` elements ends: the next begins where a buffer of its own might.
    fn padded(count: usize) -> usize {
        count.next_multiple_of(64)
    }

    /// Elements of all sections.
    pub fn len(extent: Extent) -> usize {
        let [tokens, rows, starts] = [extent.tokens, extent.rows, extent.sequences + 1].map(Inputs::padded);
        2 * tokens + 3 * rows + starts
    }

    fn over(all: Buffer<u32>, extent: Extent) -> Inputs {
        let Extent { tokens, rows, sequences, .. } = extent;
        let mut end = 0;
        let mut next = |count: usize| {
            let from = end * size_of::<u32>();
            end += Inputs::padded(count);
            from
        };
        Inputs {
            ids: all.part(next(tokens), tokens),
            targets: all.part(next(rows), rows),
            rows: all.part(next(rows), rows),
            positions: all.part(next(tokens), tokens),
            cu_seqlens: all.part(next(sequences + 1), sequences + 1),
            slopes: all.part(next(rows), rows),
            all,
        }
    }

    /// Uploads all of a batch in one piece.
    fn write(&mut self, batch: &Batch) -> Result<(), Problem> {
        assert_eq!(batch.lengths.iter().sum::<usize>(), batch.ids.len(), "lengths of a batch");
        assert_eq!(batch.rows.len(), batch.targets.len(), "rows and targets of a batch");
        let ends = batch.lengths.iter().scan(0, |end, length| {
            *end += *length as u32;
            Some(*end)
        });
        let mut all = Vec::with_capacity(self.all.len());
        let mut section = |values: &mut dyn Iterator<Item = u32>| {
            all.extend(values);
            all.resize(Inputs::padded(all.len()), 0);
        };
        section(&mut batch.ids.iter().copied());
        section(&mut batch.targets.iter().copied());
        section(&mut batch.rows.iter().map(|&row| row as u32));
        section(&mut batch.lengths.iter().flat_map(|&length| 0..length as u32));
        section(&mut std::iter::once(0).chain(ends));
        self.all.part(0, all.len()).write(&all)
    }

    /// Without a hold on their place.
    fn view(&self, region: &Region, extent: Extent) -> Inputs {
        Inputs::over(region.view(&self.all), extent)
    }
}

impl Given {
    fn of(batch: &Batch) -> Given {
        let (ids, lengths) = (batch.ids.to_vec(), batch.lengths.to_vec());
        Given { ids, lengths, rows: batch.rows.to_vec(), targets: batch.targets.to_vec() }
    }

    fn batch(&self) -> Batch<'_> {
        Batch { ids: &self.ids, lengths: &self.lengths, rows: &self.rows, targets: &self.targets }
    }

    fn shape(&self, model: &Model) -> Shape {
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

impl DeviceModel {
    /// Log-probs of the batch's targets, and what [`DeviceModel::backward`] needs.
    pub fn forward(&self, model: &Model, batch: &Batch) -> Result<(Vec<f32>, DeviceTape), Problem> {
        let given = Given::of(batch);
        let captures = model.graphs && !model.offload && self.gpu().driver().captures();
        let shape = captures.then(|| given.shape(model));
        if let Some((mut step, lease)) = shape.as_ref().and_then(|shape| self.steps.captured(shape)) {
            step.inputs.write(batch)?;
            given.named(step.there.launch())?;
            let logprobs = step.logprobs.download()?;
            return Ok((logprobs, DeviceTape { given, way: Way::Again(step, lease) }));
        }
        let extent = Extent::of(batch);
        let recompute = match model.recompute {
            Recompute::Fit => fit::on_device(model, self.gpu(), extent)?,
            decided => decided,
        };
        if let Some(shape) = &shape {
            let bytes = fit::region_bytes(model, extent, fit::kept(model, recompute));
            if let Some((region, lease)) = self.steps.room(self.gpu(), shape, bytes)? {
                if let Some(half) = self.capture_there(model, batch, region, recompute)? {
                    given.named(half.there.launch())?;
                    let logprobs = half.logprobs.download()?;
                    return Ok((logprobs, DeviceTape { given, way: Way::Captured(Box::new(half), lease) }));
                }
                self.steps.refuse(shape);
            }
        }
        let (logprobs, walk) = self.launch_there(model, batch, recompute)?;
        Ok((logprobs, DeviceTape { given, way: Way::Launched(Box::new(walk)) }))
    }

    /// Adds to `grads` the gradient of `sum_r dlogprobs[r] * logprobs[r]`.
    pub fn backward(
        &self,
        model: &Model,
        tape: DeviceTape,
        dlogprobs: &[f32],
        grads: &mut DeviceGradients,
    ) -> Result<(), Problem> {
        self.check_gradients(model, grads);
        let DeviceTape { given, way } = tape;
        let sums = &mut grads.sums[..];
        match way {
            Way::Launched(walk) => self.launch_back(model, *walk, &given, dlogprobs, sums),
            Way::Captured(half, _lease) => match self.capture_back(model, *half, &given, sums)? {
                Some(step) => self.launch_step(model, step, &given, dlogprobs, sums),
                None => {
                    self.steps.refuse(&given.shape(model));
                    self.once_more(model, &given, dlogprobs, sums)
                }
            },
            Way::Again(step, _lease) if step.adds_to(sums) => self.launch_step(model, step, &given, dlogprobs, sums),
            Way::Again(..) => self.once_more(model, &given, dlogprobs, sums),
        }
    }

    fn launch_there(&self, model: &Model, batch: &Batch, recompute: Recompute) -> Result<(Vec<f32>, Walk), Problem> {
        let extent = Extent::of(batch);
        let mut inputs = Inputs::over(self.gpu().alloc(Inputs::len(extent))?, extent);
        inputs.write(batch)?;
        let table = self.table(model, extent.longest)?;
        let (logprobs, walk) = self.way_there(model, inputs, extent.longest, table, recompute)?;
        Ok((logprobs.download()?, walk))
    }

    fn launch_back(
        &self,
        model: &Model,
        mut walk: Walk,
        given: &Given,
        dlogprobs: &[f32],
        sums: &mut [Buffer<f32>],
    ) -> Result<(), Problem> {
        walk.inputs.slopes.write(dlogprobs)?;
        match self.way_back(model, walk, sums)? {
            Some(dx) => self.embed_backward(&dx, &given.ids, sums),
            None => Ok(()),
        }
    }

    /// The way back of a step whose way there was launched as a whole, but not for these gradients, or could not be
    /// captured: both ways, kernel by kernel.
    fn once_more(
        &self,
        model: &Model,
        given: &Given,
        dlogprobs: &[f32],
        sums: &mut [Buffer<f32>],
    ) -> Result<(), Problem> {
        let recompute = if model.recompute == Recompute::Fit { Recompute::All } else { model.recompute };
        let (_, walk) = self.launch_there(model, &given.batch(), recompute)?;
        self.launch_back(model, walk, given, dlogprobs, sums)
    }

    /// `None` if the memory does not suffice, or the driver refuses.
    fn capture_there(
        &self,
        model: &Model,
        batch: &Batch,
        region: Arc<Region>,
        recompute: Recompute,
    ) -> Result<Option<Half>, Problem> {
        let extent = Extent::of(batch);
        let table = self.table(model, extent.longest)?;
        let Some(all) = unless_refused(region.alloc(Inputs::len(extent)))? else { return Ok(None) };
        let mut inputs = Inputs::over(all, extent);
        inputs.write(batch)?;
        let mut walked = None;
        let graph = self.gpu().capture_in(&region, || {
            walked = Some(self.way_there(model, inputs, extent.longest, table, recompute)?);
            Ok(())
        });
        let done = unless_refused(graph)?.zip(walked);
        Ok(done.map(|(there, (logprobs, walk))| Half { logprobs: region.view(&logprobs), region, walk, there }))
    }

    /// `None` if the memory does not suffice, or the driver refuses.
    fn capture_back(
        &self,
        model: &Model,
        half: Half,
        given: &Given,
        sums: &mut [Buffer<f32>],
    ) -> Result<Option<Box<Step>>, Problem> {
        let Half { region, walk, logprobs, there } = half;
        let inputs = walk.inputs.view(&region, Extent::of(&given.batch()));
        let mut dx = None;
        let back = self.gpu().capture_in(&region, || {
            dx = self.way_back(model, walk, sums)?;
            Ok(())
        });
        let Some(back) = unless_refused(back)? else { return Ok(None) };
        let dx = dx.map(|dx| region.view(&dx));
        let sums = sums.iter().map(Buffer::share).collect();
        Ok(Some(Box::new(Step { region, inputs, logprobs, there, back, dx, sums })))
    }

    /// The way back of a captured step, which is kept for the next time.
    fn launch_step(
        &self,
        model: &Model,
        mut step: Box<Step>,
        given: &Given,
        dlogprobs: &[f32],
        sums: &mut [Buffer<f32>],
    ) -> Result<(), Problem> {
        step.inputs.slopes.write(dlogprobs)?;
        given.named(step.back.launch())?;
        if let Some(dx) = &step.dx {
            self.embed_backward(dx, &given.ids, sums)?;
        }
        self.steps.keep(given.shape(model), step);
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

impl Step {
    fn adds_to(&self, sums: &[Buffer<f32>]) -> bool {
        // Their memory is kept, so no other buffer has the address.
        self.sums.iter().map(Buffer::address).eq(sums.iter().map(Buffer::address))
    }
}

impl Steps {
    fn all(&self) -> MutexGuard<'_, All> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The captured step of a shape, to be used and then given to [`Steps::keep`].
    fn captured(&self, shape: &Shape) -> Option<(Box<Step>, Lease)> {
        let mut all = self.all();
        let lease = all.lease()?;
        Some((all.shapes.take(shape)?, lease))
    }

    /// Where to capture a step of this shape, which takes at most so many bytes; `None` if it is to be launched kernel
    /// by kernel.
    fn room(&self, gpu: &Gpu, shape: &Shape, bytes: usize) -> Result<Option<(Arc<Region>, Lease)>, Problem> {
        let all = &mut *self.all();
        if all.off {
            return Ok(None);
        }
        all.most = all.most.max(bytes);
        let worth_it = all.shapes.note(shape);
        if all.region.is_none() && !worth_it {
            return Ok(None);
        }
        let (free, total) = gpu.driver().memory()?;
        let free = free + gpu.usage().pooled;
        if all.region.is_some() && free < bytes {
            *all = All { off: true, ..All::default() };
            return Ok(None);
        }
        match all.lease().filter(|_| worth_it) {
            Some(lease) => Ok(all.region(gpu, bytes, free, total)?.map(|region| (region, lease))),
            None => Ok(None),
        }
    }

    /// Does not try to capture it again.
    fn refuse(&self, shape: &Shape) {
        if let Some(known) = self.all().shapes.known.get_mut(shape) {
            known.refused = true;
        }
    }

    fn keep(&self, shape: Shape, step: Box<Step>) {
        let mut all = self.all();
        // Not if the region has been given back meanwhile.
        if all.region.as_ref().is_some_and(|region| Arc::ptr_eq(region, &step.region)) {
            all.shapes.keep(shape, step);
        }
    }

    /// Lets go of all that is captured.
    pub fn forget(&self) {
        self.all().shapes.forget();
    }
}

impl All {
    fn lease(&self) -> Option<Lease> {
        (Arc::strong_count(&self.lease) == 1).then(|| Lease(self.lease.clone()))
    }

    /// A region of at least so many bytes, if it leaves room for such a step beside it and a sixteenth of the device for
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
