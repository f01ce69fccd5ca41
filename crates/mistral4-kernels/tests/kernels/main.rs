//! Every kernel against its plain twin, on every instruction set of this processor.
mod attention;
mod decode;
mod decode_layer_maker;
mod elementwise;
mod experts;
mod gemm;
mod gradients;
mod loss;
mod norm_rope;
mod optimizer;
mod packed;
mod quantized;
mod quantized_grouped;
mod router;
mod support;
