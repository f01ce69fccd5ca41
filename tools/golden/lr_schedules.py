"""Writes crates/mistral4-train/tests/golden/lr_schedules.json.

Runs NeMo AutoModel's own `OptimizerParamScheduler`; give the path of `nemo_automodel/components/optim/scheduler.py`
(NeMo AutoModel of 2026-08-22, torch 2.15). Step t is the rate that the optimizer's step t uses.

    python tools/golden/lr_schedules.py PATH/scheduler.py
"""

import importlib.util
import json
import pathlib
import sys

import torch

spec = importlib.util.spec_from_file_location("scheduler", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

cases = []
styles = [("constant", None), ("linear", None), ("cosine", None), ("inverse-square-root", None)]
styles += [("WSD", s) for s in ("linear", "cosine", "exponential", "minus_sqrt")]
variants = [(style, wsd, 5, "constant", 0.1, 0.1) for style, wsd in styles]
variants += [("cosine", None, 0, "constant", 0.1, 0.1)]
variants += [("linear", None, 5, "linear", 0.0, 0.2), ("linear", None, 5, "cosine", 0.0, 0.2)]
for style, wsd, warmup, wd_style, start_wd, end_wd in variants:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0.1)
    scheduler = module.OptimizerParamScheduler(
        optimizer=optimizer,
        init_lr=1e-4,
        max_lr=1e-3,
        min_lr=1e-5,
        lr_warmup_steps=warmup,
        lr_decay_steps=30,
        lr_decay_style=style,
        start_wd=start_wd,
        end_wd=end_wd,
        wd_incr_steps=20,
        wd_incr_style=wd_style,
        wsd_decay_steps=10,
        lr_wsd_decay_style=wsd,
    )
    case = {
        "lr_decay_style": style,
        "lr_wsd_decay_style": wsd,
        "lr_warmup_steps": warmup,
        "wd_incr_style": wd_style,
        "start_wd": start_wd,
        "end_wd": end_wd,
        "lr": [],
        "wd": [],
    }
    for _ in range(36):
        case["lr"].append(optimizer.param_groups[0]["lr"])
        case["wd"].append(optimizer.param_groups[0]["weight_decay"])
        scheduler.step(1)
    cases.append(case)

out = pathlib.Path(__file__).resolve().parents[2] / "crates/mistral4-train/tests/golden/lr_schedules.json"
out.write_text(json.dumps({"format": 1, "cases": cases}) + "\n")
