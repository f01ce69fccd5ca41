//! The collective operations on Burn's CPU backend.

use std::sync::Arc;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, TensorMetadata, backend_extension};
use burn::tensor::{DType, Element, Tensor, TensorData};
use bytemuck::Pod;
use half::bf16;

use super::{Exchange, Group};

/// See the functions of the same names in [`super`].
#[backend_extension(Flex, Autodiff)]
pub(super) trait CollectiveOps: Backend {
    /// See [`super::reduce_from_group`].
    fn reduce_from_group(x: FloatTensor<Self>, group: Arc<dyn Group>) -> FloatTensor<Self>;

    /// See [`super::copy_to_group`].
    fn copy_to_group(x: FloatTensor<Self>, group: Arc<dyn Group>) -> FloatTensor<Self>;

    /// See [`super::all_to_all_rows`].
    fn all_to_all_rows(x: FloatTensor<Self>, exchange: Exchange) -> FloatTensor<Self>;
}

impl CollectiveOps for Flex {
    fn reduce_from_group(x: FloatTensor<Self>, group: Arc<dyn Group>) -> FloatTensor<Self> {
        let (shape, x) = (x.shape(), x.to_contiguous());
        match x.dtype() {
            DType::F32 => {
                let mut sum = values::<f32>(&x).to_vec();
                group.all_reduce_sum(&mut sum);
                FloatTensor::<Self>::from_data(TensorData::new(sum, shape))
            }
            DType::BF16 => {
                let mut sum: Vec<f32> = values::<bf16>(&x).iter().map(|value| value.to_f32()).collect();
                group.all_reduce_sum(&mut sum);
                let sum: Vec<bf16> = sum.into_iter().map(bf16::from_f32).collect();
                FloatTensor::<Self>::from_data(TensorData::new(sum, shape))
            }
            other => panic!("ranks add up f32 and bf16, not {other:?}"),
        }
    }

    fn copy_to_group(x: FloatTensor<Self>, _: Arc<dyn Group>) -> FloatTensor<Self> {
        x
    }

    fn all_to_all_rows(x: FloatTensor<Self>, exchange: Exchange) -> FloatTensor<Self> {
        match x.dtype() {
            DType::F32 => exchange_rows::<f32>(x, &exchange),
            DType::BF16 => exchange_rows::<bf16>(x, &exchange),
            other => panic!("ranks exchange f32 and bf16, not {other:?}"),
        }
    }
}

fn values<T: Element + Pod>(x: &FloatTensor<Flex>) -> &[T] {
    x.as_slice().expect("a contiguous tensor of this dtype")
}

fn exchange_rows<T: Element + Pod + Default>(x: FloatTensor<Flex>, exchange: &Exchange) -> FloatTensor<Flex> {
    let [rows, width] = x.shape().dims();
    assert_eq!(rows, exchange.send.iter().sum::<usize>(), "every row goes to one rank");
    let x = x.to_contiguous();
    let bytes =
        |counts: &[usize]| counts.iter().map(|rows| rows * width * size_of::<T>()).collect::<Vec<_>>();
    let received = exchange.receive.iter().sum::<usize>();
    let mut target = vec![T::default(); received * width];
    exchange.group.all_to_all(
        bytemuck::cast_slice(values::<T>(&x)),
        &bytes(&exchange.send),
        bytemuck::cast_slice_mut(&mut target),
        &bytes(&exchange.receive),
    );
    FloatTensor::<Flex>::from_data(TensorData::new(target, [received, width]))
}

pub(super) fn reduce_from_group<const D: usize>(x: Tensor<D>, group: Arc<dyn Group>) -> Tensor<D> {
    Tensor::from_dispatch(Dispatch::reduce_from_group(x.into_dispatch(), group))
}

pub(super) fn copy_to_group<const D: usize>(x: Tensor<D>, group: Arc<dyn Group>) -> Tensor<D> {
    Tensor::from_dispatch(Dispatch::copy_to_group(x.into_dispatch(), group))
}

pub(super) fn all_to_all_rows(x: Tensor<2>, exchange: Exchange) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::all_to_all_rows(x.into_dispatch(), exchange))
}
