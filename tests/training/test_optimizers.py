"""Parameter groups, Newton-Schulz against the SVD, and Muon against torch's own and against one matrix at a time."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from processes import needs_gloo, run_on_ranks
from tiny import random_ids, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers import Trainer, TrainingArguments
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssForCausalLM

from hf_moe.training import MuonAdamW, orthogonalize, parameter_groups
from hf_moe.training.optimizers import kinds_of_parameters

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_every_parameter_has_its_kind():
    kinds = kinds_of_parameters(tiny_model("sinks"))
    layer = "model.layers.1."
    expected = {
        "model.embed_tokens.weight": "embedding",
        "lm_head.weight": "embedding",
        "model.norm.weight": "norm",
        f"{layer}self_attn.sinks": "norm",
        f"{layer}self_attn.q_a_proj.weight": "matrix",
        f"{layer}mlp.gate.weight": "router",
        f"{layer}mlp.experts.gate_up_proj": "experts",
        f"{layer}mlp.experts.down_proj": "experts",
        f"{layer}mlp.shared_experts.up_proj.weight": "matrix",
        f"{layer}mlp.shared_expert_gate.weight": "matrix",
        "model.layers.0.mlp.up_proj.weight": "matrix",
    }
    assert {name: kinds[name] for name in expected} == expected
    biases = {name for name, kind in kinds_of_parameters(tiny_model("gqa")).items() if kind == "bias"}
    assert biases == {f"model.layers.{i}.self_attn.{part}.bias" for i in range(3) for part in
                      ("q_proj", "kv_a_proj_with_mqa", "o_proj")}  # fmt: skip


def test_routers_beside_a_shared_expert_as_wide_as_there_are_experts_and_beside_what_peft_wraps():
    routers = {f"model.layers.{i}.mlp.gate.weight" for i in (1, 2)}
    model = tiny_model("sinks", n_routed_experts=24, shared_expert_intermediate_size=24)
    assert {name for name, kind in kinds_of_parameters(model).items() if kind == "router"} == routers
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_parameters=targets, modules_to_save=["gate"]))
    kinds = kinds_of_parameters(adapted)
    assert {name for name, kind in kinds.items() if kind == "router"} == {
        f"base_model.model.{name}".replace("gate.", "gate.modules_to_save.default.") for name in routers
    }
    assert set(kinds.values()) == {"router", "matrix"}


def test_groups_hold_each_parameter_that_trains_once():
    model = tiny_model("gqa")
    groups = parameter_groups(model, weight_decay=0.1, router={"lr": 1e-5})
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    by_name = {group["name"]: group for group in groups}
    assert by_name["router"]["lr"] == 1e-5
    assert {name for name, group in by_name.items() if group["weight_decay"]} == {"experts", "embedding", "matrix"}
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert {group["name"] for group in parameter_groups(adapted)} == {"matrix"}
    with pytest.raises(ValueError, match="no parameters of kind 'router' that train; it has matrix"):
        parameter_groups(adapted, router={"lr": 1e-5})


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (3, 8, 8), (2, 3, 5, 9)])
def test_singular_values_come_near_one_and_vectors_stay(shape):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalize(matrix).float()
    values = u.mT @ result @ vh.mT
    diagonal = values.diagonal(dim1=-2, dim2=-1)
    assert 0.6 < diagonal.min() < diagonal.max() < 1.3
    assert (values - torch.diag_embed(diagonal)).abs().max() < 0.05
    assert orthogonalize(torch.zeros(shape)).abs().max() == 0


def test_one_matrix_moves_as_by_torchs_muon():
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 60).view(6, 10).sin()) for _ in range(2))
    optimizer = MuonAdamW([{"params": [ours], "muon": True}], lr=0.1, weight_decay=0.2)
    expected = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.2, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        for parameter in (ours, theirs):
            parameter.grad = torch.randn(6, 10, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        expected.step()
    # Both compute in bfloat16, here with a batch dimension: products are summed in another order.
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.005)


def test_the_rest_moves_as_by_adamw():
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2))
    optimizers = MuonAdamW([ours], lr=0.1, weight_decay=0.2), torch.optim.AdamW(
        [theirs], lr=0.1, weight_decay=0.2, betas=(0.9, 0.95)
    )  # fmt: skip
    for step in range(3):
        ours.grad = theirs.grad = torch.linspace(-step, 2, 5)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def gpt_oss():
    torch.manual_seed(0)
    return GptOssForCausalLM(GptOssConfig(
        vocab_size=99, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, num_local_experts=3, num_experts_per_tok=2, layer_types=["full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ))  # fmt: skip


@pytest.mark.parametrize("kind", ["hf_moe", "gpt_oss"])
def test_gate_and_up_of_each_expert_are_matrices_of_their_own(kind):
    # gpt-oss keeps (E, D, 2F) with gate and up in turn.
    model = tiny_model("gqa") if kind == "hf_moe" else gpt_oss()
    experts = next(m for m in model.modules() if hasattr(m, "gate_up_proj"))
    weight = experts.gate_up_proj
    before = weight.detach().clone()
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    MuonAdamW.of_model(model, lr=0.1).step()
    moved = (before - weight.detach()) / 0.1
    for expert in range(len(weight)):
        for half in range(2):
            F = before.shape[1] // 2
            pick = (slice(half * F, half * F + F),) if kind == "hf_moe" else (slice(None), slice(half, None, 2))
            alone = weight.grad[expert][pick] * 1.95
            scale = 0.2 * max(alone.shape) ** 0.5
            torch.testing.assert_close(moved[expert][pick], orthogonalize(alone).float() * scale, rtol=0.03, atol=0.01)


def test_under_trainer_it_learns_and_resumes(tmp_path):
    ids = random_ids(4, 12)
    data = [{"input_ids": row, "labels": row} for row in ids] * 16

    def run(name, **resume):
        arguments = TrainingArguments(
            str(tmp_path / name), max_steps=8, per_device_train_batch_size=4, save_steps=4, logging_steps=1,
            use_cpu=True, report_to="none", disable_tqdm=True, train_sampling_strategy="sequential",
        )  # fmt: skip
        model = tiny_model("gqa")
        options = {"lr": 0.02, "weight_decay": 0.01, "router": {"lr": 0.001}}
        trainer = Trainer(
            model, arguments, train_dataset=data, optimizer_cls_and_kwargs=(MuonAdamW.for_trainer, options)
        )
        trainer.train(**resume)
        return model, trainer

    whole, trainer = run("whole")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    rates = {group["name"]: group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert (rates["router"], rates["experts"]) == (0.001, 0.02)
    resumed, _ = run("resumed", resume_from_checkpoint=str(tmp_path / "whole/checkpoint-4"))
    for (name, weight), expected in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, msg=name)


def sharded(rank, folder):
    """One step on parameters cut along experts, and along rows, against the whole."""
    mesh = init_device_mesh("cpu", (2,))
    for shape, placement in (((5, 6, 4), Shard(0)), ((5, 6, 4), Shard(1)), ((6, 4), Shard(0)), ((6, 4), Replicate())):
        value = torch.linspace(-1, 2, 120)[: torch.Size(shape).numel()].view(shape).sin()
        whole = torch.nn.Parameter(value.clone())
        whole.grad = value.cos()
        part = torch.nn.Parameter(distribute_tensor(value.clone(), mesh, [placement]))
        part.grad = distribute_tensor(value.cos(), mesh, [placement])
        for parameter in (whole, part):
            MuonAdamW([{"params": [parameter], "muon": True}], lr=0.1, weight_decay=0.1).step()
        torch.testing.assert_close(part.full_tensor(), whole.detach(), rtol=0.02, atol=0.005)


@needs_gloo
def test_sharded_parameters_move_as_whole_ones(tmp_path):
    run_on_ranks(sharded, 2, tmp_path)


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"got a parameter of shape \(3,\)"):
        MuonAdamW([{"params": [torch.nn.Parameter(torch.zeros(3))], "muon": True}])
