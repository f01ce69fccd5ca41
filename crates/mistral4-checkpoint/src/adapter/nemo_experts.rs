//! Adapters of experts in the two forms that NeMo AutoModel writes.
//!
//! Its own form has stacks beside the experts, inputs first: `experts.lora_gate_and_up_A` `[E, in, r]`,
//! `experts.lora_gate_and_up_B` `[E, r, out]`, `experts.lora_down_A`, `experts.lora_down_B`. The other one has a LoRA for
//! each linear map of each expert, `experts.3.gate_proj.lora_A.weight`, in which an expert's gate and up projections have
//! the same `lora_A`. Both become the adapters of the two stacks here.
//!
//! Source: `GroupedExpertsLoRA` and `MoESplitExpertsStateDictMixin._convert_lora_expert_to_hf` in NVIDIA NeMo AutoModel.

use std::collections::BTreeMap;

use super::peft_files::{Part, Stored, transposed};
use crate::weights::HostTensor;

/// The stack and the part of it that a tensor in NeMo AutoModel's own form is; `None` for all others.
pub(super) fn native(key: &str) -> Option<(String, Part)> {
    let names = [
        (".lora_gate_and_up_A", "gate_up_proj", Part::A),
        (".lora_gate_and_up_B", "gate_up_proj", Part::B),
        (".lora_down_A", "down_proj", Part::A),
        (".lora_down_B", "down_proj", Part::B),
    ];
    let is = |(end, stack, part)| Some((format!("{}.{stack}", key.strip_suffix(end)?), part));
    names.into_iter().find_map(is)
}

/// A stack in NeMo AutoModel's own form with its inputs last.
pub(super) fn inputs_last(tensor: HostTensor) -> Result<HostTensor, String> {
    match tensor.shape.len() {
        3 => Ok(transposed(tensor)),
        _ => Err(format!("a stack has three axes, and its shape is {:?}", tensor.shape)),
    }
}

/// Puts the matrices of single experts together to those of their stacks.
///
/// # Errors
/// The module and what is wrong with it: an expert that is missing, and gate and up projections with `lora_A` of their own.
pub(super) fn stack(stored: &mut BTreeMap<String, Stored>) -> Result<(), (String, String)> {
    // By the module of the experts: their linear maps, by number and name.
    let mut experts: BTreeMap<String, BTreeMap<(usize, String), Stored>> = BTreeMap::new();
    let single: Vec<String> = stored.keys().filter(|key| of_one_expert(key).is_some()).cloned().collect();
    for key in single {
        let (module, index, linear) = of_one_expert(&key).expect("others were left out");
        let entry = experts.entry(module.to_owned()).or_default();
        entry.insert((index, linear.to_owned()), stored.remove(&key).expect("the key is one of them"));
    }
    for (module, mut linears) in experts {
        let count = linears.keys().map(|(index, _)| index + 1).max().unwrap_or(0);
        for (name, parts) in [("gate_up_proj", &["gate_proj", "up_proj"][..]), ("down_proj", &["down_proj"])]
        {
            if !linears.keys().any(|(_, linear)| parts.contains(&linear.as_str())) {
                continue;
            }
            let (mut a, mut b) = (Vec::new(), Vec::new());
            for index in 0..count {
                let mut first: Option<HostTensor> = None;
                for part in parts {
                    let at = || format!("{module}.{index}.{part}");
                    let lora = linears.remove(&(index, (*part).to_owned()));
                    let Some(Stored { a: Some(part_a), b: Some(part_b), magnitude: None }) = lora else {
                        return Err((
                            at(),
                            "every expert needs its lora_A and lora_B, and no magnitude".into(),
                        ));
                    };
                    if *first.get_or_insert_with(|| part_a.clone()) != part_a {
                        return Err((
                            at(),
                            "an expert's gate and up projections need the same lora_A, as NeMo AutoModel trains them"
                                .into(),
                        ));
                    }
                    b.push(part_b);
                }
                a.extend(first);
            }
            let stack = format!("{module}.{name}");
            let joined = |tensors| joined(tensors, count).map_err(|problem| (stack.clone(), problem));
            let lora = Stored { a: Some(joined(a)?), b: Some(joined(b)?), magnitude: None };
            stored.insert(stack, lora);
        }
    }
    Ok(())
}

/// Module of the experts, number of the expert, and its linear map.
fn of_one_expert(module: &str) -> Option<(&str, usize, &str)> {
    let (rest, linear) = module.rsplit_once('.')?;
    let (experts, index) = rest.rsplit_once('.')?;
    let is_linear = ["gate_proj", "up_proj", "down_proj"].contains(&linear);
    (is_linear && experts.ends_with(".experts")).then_some(())?;
    Some((experts, index.parse().ok()?, linear))
}

/// Matrices of one shape one after the other, as `count` matrices.
fn joined(tensors: Vec<HostTensor>, count: usize) -> Result<HostTensor, String> {
    let parts = tensors.len() / count;
    let mut tensors = tensors.into_iter();
    let HostTensor { shape, mut data } = tensors.next().ok_or("it has no experts")?;
    let [rows, columns] = shape[..] else {
        return Err(format!("a matrix has two axes, and the shape of one is {shape:?}"));
    };
    for tensor in tensors {
        if tensor.shape != shape || !data.append(tensor.data) {
            return Err("its experts' matrices differ in shape or number format".into());
        }
    }
    Ok(HostTensor { shape: vec![count, rows * parts, columns], data })
}
