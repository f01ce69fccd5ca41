//! Weights of a decoded token: packed or quantised, multiplied with one row at a time.
use crate::element::Element;
use crate::experts::{Activation, gate_slices};
use crate::gemm::{Bf16Pair, HALF, NR, PackedMatrix, Upcoming, multiply_packed};
use crate::isa::Isa;
use crate::parallel::Shared;
use crate::phases::Tasks;
use crate::quantized::{Activations, LANES, QuantizedMatrix, StackDims, product};
use crate::scratch::{self, Scratch};
use crate::vector::per_isa;
use half::bf16;
use std::ops::Range;
use std::sync::Arc;

/// Outputs that are computed together: one panel of a packed matrix, two of a quantised one.
pub(super) const BLOCK: usize = NR;
/// Panels of a quantised matrix in a block.
const PANELS: usize = BLOCK / LANES;

/// A frozen weight, or one of each expert.
#[derive(Clone, Debug)]
pub enum DecodeWeight {
    /// bf16.
    Packed(Arc<PackedMatrix>),
    /// Codes; gate and up of an expert are two matrices.
    Quantized(Arc<QuantizedMatrix>),
}

impl DecodeWeight {
    pub(super) fn dims(&self) -> StackDims {
        match self {
            DecodeWeight::Packed(weight) => weight.dims(),
            DecodeWeight::Quantized(weight) => weight.dims(),
        }
    }

    /// Experts, outputs and inputs of a weight that holds gate and up of each expert.
    pub(super) fn gated_dims(&self) -> StackDims {
        match self {
            DecodeWeight::Packed(weight) => {
                let dims = weight.dims();
                assert!(weight.is_gated(), "gate and up share panels");
                StackDims { rows: dims.rows / 2, ..dims }
            }
            DecodeWeight::Quantized(weight) => {
                let dims = weight.dims();
                StackDims { matrices: dims.matrices / 2, ..dims }
            }
        }
    }

    /// Bytes of one matrix.
    pub(super) fn matrix_bytes(&self) -> usize {
        let bytes = match self {
            DecodeWeight::Packed(weight) => weight.bytes(),
            DecodeWeight::Quantized(weight) => weight.bytes(),
        };
        bytes / self.dims().matrices.max(1)
    }

    /// `sums[blocks, BLOCK] = weight x` for some blocks of a matrix; sums past the last output are unspecified.
    pub(super) fn multiply(
        &self,
        isa: Isa,
        matrix: usize,
        blocks: Range<usize>,
        x: Row<'_>,
        sums: &mut [f32],
    ) {
        assert_eq!(sums.len(), blocks.len() * BLOCK);
        match (self, x.rows) {
            (DecodeWeight::Packed(weight), Rows::Pairs(left)) => {
                panels(isa, weight, matrix, blocks, (left, x.index), sums);
            }
            (DecodeWeight::Quantized(weight), Rows::Quantized(rows)) => {
                let panels = blocks.start * PANELS..(blocks.end * PANELS).min(weight.panels());
                let sums = &mut sums[..panels.len() * LANES];
                product(isa, weight, matrix, panels, rows, &[x.index as u32], sums);
            }
            _ => unreachable!("rows are made for the weight that they meet"),
        }
    }

    /// `inner[blocks, BLOCK] = act(gate x) * (up x)` of an expert; what lies past the last output is unspecified.
    pub(super) fn multiply_gated(
        &self,
        isa: Isa,
        activation: Activation,
        expert: usize,
        blocks: Range<usize>,
        x: Row<'_>,
        inner: &mut [f32],
    ) {
        assert_eq!(inner.len(), blocks.len() * BLOCK);
        let mut sums = scratch::take::<f32>(2 * inner.len());
        match (self, x.rows) {
            (DecodeWeight::Packed(weight), Rows::Pairs(left)) => {
                let last = (weight.dims().rows / 2).div_ceil(HALF);
                let both = 2 * blocks.start..(2 * blocks.end).min(last);
                let sums = &mut sums[..both.len() * NR];
                panels(isa, weight, expert, both, (left, x.index), sums);
                for (sums, inner) in sums.chunks_exact_mut(NR).zip(inner.chunks_exact_mut(HALF)) {
                    let (gate, up) = sums.split_at_mut(HALF);
                    gate_slices(isa, activation, gate, up);
                    inner.copy_from_slice(gate);
                }
            }
            (DecodeWeight::Quantized(_), _) => {
                let (gate, up) = sums.split_at_mut(inner.len());
                self.multiply(isa, 2 * expert, blocks.clone(), x, gate);
                self.multiply(isa, 2 * expert + 1, blocks, x, up);
                gate_slices(isa, activation, gate, up);
                inner.copy_from_slice(gate);
            }
            _ => unreachable!("rows are made for the weight that they meet"),
        }
    }
}

/// Multiplies one row of packed ones with some panels.
fn panels(
    isa: Isa,
    weight: &PackedMatrix,
    matrix: usize,
    panels: Range<usize>,
    (left, row): (&[Bf16Pair], usize),
    sums: &mut [f32],
) {
    let right = weight.panels(matrix, panels).chunks_exact(weight.panel_len().max(1));
    multiply_packed(isa, left, row..row + 1, weight.dims().columns, right, &mut Upcoming::none(), sums);
}

/// Rows of activations in the form that products with one weight take.
pub(super) enum Rows {
    /// `[rows, steps]`
    Pairs(Scratch<Bf16Pair>),
    Quantized(Activations),
}

/// One of some rows.
#[derive(Clone, Copy)]
pub(super) struct Row<'a> {
    rows: &'a Rows,
    index: usize,
}

impl Rows {
    /// Prepares rows of as many values as `weight` has columns.
    pub(super) fn new<'a, T: Element>(
        isa: Isa,
        weight: &DecodeWeight,
        count: usize,
        row: impl Fn(usize) -> &'a [T] + Sync + Send,
    ) -> Self {
        match weight {
            DecodeWeight::Packed(weight) => {
                let columns = weight.dims().columns;
                let steps = columns.div_ceil(2);
                let mut pairs = scratch::take::<Bf16Pair>(count * steps);
                for (index, pairs) in pairs.chunks_exact_mut(steps.max(1)).enumerate() {
                    to_pairs(isa, &row(index)[..columns], pairs);
                }
                Rows::Pairs(pairs)
            }
            DecodeWeight::Quantized(weight) => {
                Rows::Quantized(Activations::new::<bf16, T>(isa, weight, count, row))
            }
        }
    }

    /// Prepares one row.
    pub(super) fn one<T: Element>(isa: Isa, weight: &DecodeWeight, values: &[T]) -> Self {
        Self::new(isa, weight, 1, |_| values)
    }

    pub(super) fn row(&self, index: usize) -> Row<'_> {
        Row { rows: self, index }
    }
}

per_isa! {
    fn to_pairs<T: Element>(values: &[T], pairs: &mut [Bf16Pair]) = to_pairs_body;
}

#[inline(always)]
fn to_pairs_body<T: Element, const FMA: bool>(values: &[T], pairs: &mut [Bf16Pair]) {
    use crate::gemm::Panel;
    let (whole, last) = values.as_chunks::<2>();
    for (pair, [first, second]) in pairs.iter_mut().zip(whole) {
        *pair = Bf16Pair::pack(*first, Some(*second));
    }
    if let ([last], Some(pair)) = (last, pairs.last_mut()) {
        *pair = Bf16Pair::pack(*last, None);
    }
}

/// Blocks of the outputs of some equal matrices, cut into tasks.
#[derive(Clone, Copy)]
pub(super) struct Cut {
    blocks: usize,
    of_task: usize,
    /// Tasks of one matrix.
    of_matrix: usize,
    pub(super) tasks: usize,
}

impl Cut {
    /// Cuts `matrices` matrices of `outputs` outputs, of which each takes `bytes` to read.
    pub(super) fn new(matrices: usize, outputs: usize, bytes: usize) -> Self {
        /// Fewer bytes are not worth a task.
        const BYTES: usize = 16 << 10;
        let blocks = outputs.div_ceil(BLOCK);
        let tasks = (matrices * bytes / BYTES).clamp(1, 4 * rayon::current_num_threads());
        let of_task = (matrices * blocks).div_ceil(tasks).clamp(1, blocks.max(1));
        let of_matrix = blocks.div_ceil(of_task);
        Self { blocks, of_task, of_matrix, tasks: matrices * of_matrix }
    }

    /// The matrix and the blocks of a task.
    pub(super) fn task(&self, task: usize) -> (usize, Range<usize>) {
        let first = task % self.of_matrix * self.of_task;
        (task / self.of_matrix, first..(first + self.of_task).min(self.blocks))
    }
}

/// The products of one row with one matrix, cut into tasks.
#[derive(Clone, Copy)]
pub(super) struct Product<'a> {
    weight: &'a DecodeWeight,
    cut: Cut,
}

impl<'a> Product<'a> {
    pub(super) fn new(weight: &'a DecodeWeight) -> Self {
        Self { weight, cut: Cut::new(1, weight.dims().rows, weight.matrix_bytes()) }
    }

    pub(super) fn tasks(&self) -> usize {
        self.cut.tasks
    }

    /// Does one task.
    pub(super) fn run<Y: Element>(&self, isa: Isa, task: usize, x: &Rows, y: Shared<'_, Y>) {
        // SAFETY: each task owns its outputs.
        self.run_with(isa, task, x, |columns, sums| store(isa, sums, unsafe { y.slice(columns) }));
    }

    /// Does one task, whose outputs and sums `finish` gets.
    pub(super) fn run_with(
        &self,
        isa: Isa,
        task: usize,
        x: &Rows,
        finish: impl FnOnce(Range<usize>, &[f32]),
    ) {
        let (_, blocks) = self.cut.task(task);
        let mut sums = scratch::take::<f32>(blocks.len() * BLOCK);
        self.weight.multiply(isa, 0, blocks.clone(), x.row(0), &mut sums);
        let columns = blocks.start * BLOCK..(blocks.end * BLOCK).min(self.weight.dims().rows);
        finish(columns.clone(), &sums[..columns.len()]);
    }
}

per_isa! {
    pub(super) fn store<Y: Element>(sums: &[f32], y: &mut [Y]) = store_body;
}

#[inline(always)]
fn store_body<Y: Element, const FMA: bool>(sums: &[f32], y: &mut [Y]) {
    for (y, sum) in y.iter_mut().zip(sums) {
        *y = Y::from_f32(*sum);
    }
}

per_isa! {
    /// `y = sums`, rounded to bf16.
    pub(super) fn store_rounded(sums: &[f32], y: &mut [f32]) = store_rounded_body;
}

#[inline(always)]
fn store_rounded_body<const FMA: bool>(sums: &[f32], y: &mut [f32]) {
    for (y, sum) in y.iter_mut().zip(sums) {
        *y = <bf16 as Element>::from_f32(*sum).to_f32();
    }
}

per_isa! {
    /// `y = x + sums`, where sums are rounded before they are added, as a product of its own would be.
    pub(super) fn add_store(x: &[bf16], sums: &[f32], y: &mut [bf16]) = add_store_body;
}

#[inline(always)]
fn add_store_body<const FMA: bool>(x: &[bf16], sums: &[f32], y: &mut [bf16]) {
    for ((y, x), sum) in y.iter_mut().zip(x).zip(sums) {
        let sum = <bf16 as Element>::from_f32(*sum).to_f32();
        *y = Element::from_f32(Element::to_f32(*x) + sum);
    }
}

/// Prepares what the tasks of a phase share when this thread gets the first of them, then does them.
pub(super) fn with_prepared<T>(tasks: &mut Tasks<'_>, prepare: impl FnOnce() -> T, work: impl Fn(&T, usize)) {
    let Some(first) = tasks.next() else { return };
    let prepared = prepare();
    work(&prepared, first);
    tasks.for_each(|task| work(&prepared, task));
}
