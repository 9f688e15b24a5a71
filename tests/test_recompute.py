"""recompute_act: the gradients and statistics of plain training, from fewer saved activations."""

import copy
from collections import Counter
from functools import partial

import pytest
import timm
import torch
from common import SMALL, count_kept, images
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

SMALL_FEATURES = {key: value for key, value in SMALL.items() if key != "num_classes"}


def make(recompute: bool, seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("cmt_ti", recompute_act=recompute, **{**SMALL, **kwargs}).train()


def step(model: nn.Module, x: torch.Tensor, autocast: bool = False) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = nn.functional.cross_entropy(model(x), torch.arange(len(x)) % 10)
    loss.backward()
    return loss.detach()


def assert_same_step(
    plain: nn.Module, other: nn.Module, dtype=torch.float64, tolerance: float = 1e-9, **kwargs
) -> None:
    plain, other, x = plain.to(dtype), other.to(dtype), images().to(dtype)
    torch.testing.assert_close(step(other, x, **kwargs), step(plain, x, **kwargs), rtol=tolerance, atol=0)
    scale = max(param.grad.norm() for param in plain.parameters())
    for (name, a), b in zip(other.named_parameters(), plain.parameters()):
        assert a.grad is not None and a.grad.dtype == dtype, name
        assert (a.grad - b.grad).norm() <= tolerance * (b.grad.norm() + 1e-3 * scale), name
    for (name, a), b in zip(other.named_buffers(), plain.buffers()):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=name)


def test_loss_gradients_and_running_statistics_are_those_of_plain_training():
    assert_same_step(make(False), make(True))


class Counts(TorchDispatchMode):
    """How often each operator has run in it."""

    def __init__(self):
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.of[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_no_convolution_or_matrix_product_runs_twice():
    with Counts() as plain:
        step(make(False), images())
    with Counts() as other:
        step(make(True), images())
    assert other.of["gelu"] > plain.of["gelu"] > 0
    for product in ("convolution", "mm", "addmm", "bmm"):
        assert other.of[product] == plain.of[product], product


def test_second_gradients_are_those_of_plain_training():
    plain, other, x = make(False).double(), make(True).double(), images().double().requires_grad_()
    for model in (plain, other):
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
    for (name, a), b in zip(other.named_parameters(), plain.parameters()):
        if b.grad is not None:  # the last bias has none
            torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_in_float32_to_rounding():
    assert_same_step(make(False), make(True), torch.float32, 1e-4)


def test_under_autocast():
    assert_same_step(make(False), make(True), torch.float32, 0.05, autocast=True)


def test_gradients_of_a_second_use_under_the_same_autocast():
    plain, other = make(False), make(True)
    grads = []
    for model in (plain, other):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model.train()(images())
            loss = model.eval()(images()).float().square().sum()  # where recompute_act is off
        loss.backward()
        grads.append({name: param.grad for name, param in model.named_parameters()})
    for name, expected in grads[0].items():
        assert (grads[1][name] - expected).norm() <= 0.05 * expected.norm() + 1e-3, name


def test_a_step_in_float16_with_a_gradient_scaler_and_averaged_weights():
    averages = []
    for model in (make(False), make(True)):
        scaler, ema = torch.amp.GradScaler("cpu", init_scale=1024.0), ModelEmaV3(model, decay=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with torch.autocast("cpu", dtype=torch.float16):
            loss = nn.functional.cross_entropy(model(images()), torch.arange(4))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 1024.0  # no gradient was infinite, so the step was taken
        ema.update(model)
        averages.append(ema.module.state_dict())
    for (name, expected), actual in zip(averages[0].items(), averages[1].values()):
        torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("momentum", [None, 0.1])
def test_gradient_checkpointing_moves_the_statistics_once_a_step(recompute, momentum):
    plain, other = make(False), make(recompute)
    other.set_grad_checkpointing()
    for model in (plain, other):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum
    for _ in range(2):
        assert_same_step(plain, other)
    norm = other.stages[0].blocks[0].mlp.norm
    assert int(norm.num_batches_tracked) == 2 and norm.momentum == momentum


def test_statistics_that_are_switched_off_stay():
    plain, other = make(False), make(True)
    for model in (plain, other):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats = False  # as for a second view of the images
    assert_same_step(plain, other)
    assert int(other.stem.conv2.norm.num_batches_tracked) == 0


def test_convolutions_that_were_changed():
    plain, other = make(False), make(True)
    for model in (plain, other):
        model.stages[0].blocks[0].mlp.dwconv.conv.padding_mode = "circular"
        model.stages[1].blocks[0].mlp.dwconv.conv.bias = None
        model.stages[2].blocks[0].mlp.dwconv.conv.padding = "same"
    assert_same_step(plain, other)


def test_with_frozen_batchnorm_statistics():
    plain, other = make(False), make(True)
    for model in (plain, other):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
                module.running_mean.normal_(generator=torch.Generator().manual_seed(2))
    assert_same_step(plain, other)


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_running_statistics_are_updated_once_a_use(momentum):
    plain, other = make(False), make(True)
    for model in (plain, other):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum
        block = model.stages[2].blocks[0]
        model.stages[2].blocks = nn.ModuleList([block, block])  # a block used twice
    assert_same_step(plain, other)
    assert int(other.stages[2].blocks[0].mlp.dwconv.norm.num_batches_tracked) == 2
    assert int(other.stages[0].blocks[0].mlp.dwconv.norm.num_batches_tracked) == 1


def test_evaluation_and_averaged_copies_are_plain():
    plain, other = make(False).eval(), make(True).eval()
    with torch.no_grad():
        assert torch.equal(plain(images()), other(images()))
        assert torch.equal(plain(images()), copy.deepcopy(other)(images()))
        # TorchScript takes other kernels.
        torch.testing.assert_close(torch.jit.script(other)(images()), plain(images()), rtol=1e-4, atol=1e-4)


def test_weights_that_functional_call_lends_have_the_gradients_of_plain_training():
    gradients = []
    for recompute in (False, True):
        model = make(recompute).double()
        lent = {name: (param.detach() + 0.01).requires_grad_() for name, param in model.named_parameters()}
        loss = torch.func.functional_call(model, lent, (images().double(),)).square().mean()
        gradients.append(torch.autograd.grad(loss, list(lent.values())))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_an_activation_that_writes_over_its_input_trains_as_without_it():
    assert_same_step(*(make(recompute, act_layer=partial(nn.ReLU, inplace=True)) for recompute in (False, True)))


def test_gradient_checkpointing_keeps_less():
    plain, other = make(False), make(False)
    other.set_grad_checkpointing()
    assert count_kept(other, images()) < 0.5 * count_kept(plain, images())


def test_nothing_is_computed_twice_in_evaluation():
    counts = []
    for recompute in (False, True):
        with Counts() as operators:
            make(recompute).eval()(images()).sum().backward()
        counts.append(operators.of)
    assert counts[0] == counts[1] and counts[0]["gelu"]


def test_dropout_other_activations_and_hooks_train_as_without_it():
    plain, other = (make(r, act_layer="silu", proj_drop_rate=0.2, drop_path_rate=0.2) for r in (False, True))
    other.stages[0].blocks[0].mlp.conv2.conv.register_forward_hook(lambda *_: None)
    x = images().double()
    losses = []
    for model in (plain.double(), other.double()):
        torch.manual_seed(3)
        losses.append(step(model, x))
    torch.testing.assert_close(losses[0], losses[1])
    for a, b in zip(other.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


def test_adapters_train_as_without_it():
    peft = pytest.importorskip("peft", reason="NOT TESTED: adapters; pip install peft")
    config = peft.LoraConfig(target_modules=["q", "conv2.conv"], init_lora_weights=False)
    models = []
    for recompute in (False, True):
        model = make(recompute)
        torch.manual_seed(1)
        models.append(peft.get_peft_model(model, config).train())
    for model in models:
        step(model, images())
    for (name, a), b in zip(models[1].named_parameters(), models[0].parameters()):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("how", ["checkpointing", "recompute_act", "both"])
def test_synchronised_batchnorms_train_as_without_it(how):
    plain, other = (nn.SyncBatchNorm.convert_sync_batchnorm(make(r)) for r in (False, how != "checkpointing"))
    other.set_grad_checkpointing(how != "recompute_act")
    assert_same_step(plain.train(), other.train())
    assert int(other.stages[0].blocks[0].mlp.norm.num_batches_tracked) == 1


def test_an_empty_batch_with_frozen_norms_trains_as_without_it():
    for recompute in (False, True):
        model = make(recompute)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        model(images()[:0]).sum().backward()
        assert all(not param.grad.any() for param in model.parameters())


def test_a_detector_s_backbone_moves_its_statistics_once_a_step():
    from timm_cmt.detection import FPNBackbone

    counts = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        backbone = FPNBackbone("cmt_ti", **SMALL_FEATURES).train()
        backbone.body.set_grad_checkpointing(checkpointing)
        sum(feature.square().mean() for feature in backbone(images()).values()).backward()
        counts.append(dict(backbone.named_buffers()))
    for name, value in counts[0].items():
        torch.testing.assert_close(counts[1][name], value, msg=name)


@pytest.mark.parametrize("feature_cls", ["list", "hook"])
def test_checkpointing_by_timm_s_feature_extractors_moves_the_statistics_once_a_step(feature_cls):
    counts = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = timm.create_model("cmt_ti", features_only=True, feature_cls=feature_cls, **SMALL_FEATURES).train()
        model.set_grad_checkpointing(checkpointing)
        sum(feature.square().mean() for feature in model(images())).backward()
        counts.append(dict(model.named_buffers()))
    for name, value in counts[0].items():
        torch.testing.assert_close(counts[1][name], value, msg=name)


def test_cmt_s_keeps_at_most_55_percent_of_what_the_authors_code_does():
    model = timm.create_model("cmt_s", recompute_act=True).train()
    authors = 257_064_504  # bytes of one image that benchmarks/memory.py counts
    assert count_kept(model, images(1, height=224, width=224)) <= 0.55 * authors
