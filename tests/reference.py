"""CMT from the paper's equations, in plain functions on the authors' state dict: what the models are compared with."""

import torch
import torch.nn.functional as F
from torch import Tensor

HEADS = dict(a=1, b=2, c=4, d=8)
REDUCTION = dict(a=8, b=4, c=2, d=1)


def cmt(weights: dict[str, Tensor], images: Tensor, training: bool) -> dict[str, Tensor]:
    """-> the stages' maps 'a'-'d', 'pooled' and 'logits'; batch statistics where `training`."""

    def conv(x: Tensor, key: str, **kwargs) -> Tensor:
        return F.conv2d(x, weights[f"{key}.weight"], weights[f"{key}.bias"], **kwargs)

    def depthwise(x: Tensor, key: str) -> Tensor:
        return conv(x, key, padding=1, groups=x.shape[1])

    def linear(x: Tensor, key: str) -> Tensor:
        return F.linear(x, weights[f"{key}.weight"], weights[f"{key}.bias"])

    def batch_norm(x: Tensor, key: str) -> Tensor:
        mean, var = weights[f"{key}.running_mean"].clone(), weights[f"{key}.running_var"].clone()
        return F.batch_norm(x, mean, var, weights[f"{key}.weight"], weights[f"{key}.bias"], training, 0.1, 1e-5)

    def layer_norm(x: Tensor, key: str, eps: float) -> Tensor:
        tokens = x.permute(0, 2, 3, 1)
        tokens = F.layer_norm(tokens, tokens.shape[-1:], weights[f"{key}.weight"], weights[f"{key}.bias"], eps)
        return tokens.permute(0, 3, 1, 2)

    def attention(x: Tensor, key: str, stage: str) -> Tensor:  # eq. 3
        B, C, H, W = x.shape
        heads, k = HEADS[stage], REDUCTION[stage]

        def split(tokens: Tensor) -> Tensor:
            return tokens.unflatten(2, (heads, C // heads)).transpose(1, 2)

        queries = split(linear(x.flatten(2).transpose(1, 2), f"{key}.q"))
        if k > 1:
            x = batch_norm(conv(x, f"{key}.sr.0", stride=k, groups=C), f"{key}.sr.1")
        tokens = x.flatten(2).transpose(1, 2)
        keys, values = split(linear(tokens, f"{key}.k")), split(linear(tokens, f"{key}.v"))
        scores = queries @ keys.transpose(2, 3) / (C // heads) ** 0.5 + weights[f"relative_pos_{stage}"]
        out = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
        return linear(out, f"{key}.proj").transpose(1, 2).unflatten(2, (H, W))

    def ffn(x: Tensor, key: str) -> Tensor:  # eq. 5
        x = batch_norm(F.gelu(conv(x, f"{key}.conv1.0")), f"{key}.conv1.2")
        x = batch_norm(F.gelu(depthwise(x, f"{key}.proj") + x), f"{key}.proj_bn")
        return batch_norm(conv(x, f"{key}.conv2.0"), f"{key}.conv2.1")

    out = {}
    x = images
    for i in (1, 2, 3):
        x = conv(x, f"stem_conv{i}", padding=1, stride=2 if i == 1 else 1)
        x = batch_norm(F.gelu(x), f"stem_norm{i}")
    for stage in "abcd":
        x = layer_norm(conv(x, f"patch_embed_{stage}.proj", stride=2), f"patch_embed_{stage}.norm", 1e-5)
        depth = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith(f"blocks_{stage}."))
        for block in (f"blocks_{stage}.{j}" for j in range(depth)):
            x = x + depthwise(x, f"{block}.proj")  # eqs. 1, 6
            x = x + attention(layer_norm(x, f"{block}.norm1", 1e-6), f"{block}.attn", stage)  # eq. 7
            x = x + ffn(layer_norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp")  # eq. 8
        out[stage] = x
    x = F.silu(batch_norm(conv(x, "_fc"), "_bn"))
    out["pooled"] = x.mean((2, 3))
    out["logits"] = linear(out["pooled"], "head")
    return out


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a fraction of the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def loss_and_input_gradient(logits: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    labels = torch.arange(len(logits)) * 7 % logits.shape[1]
    loss = F.cross_entropy(logits, labels)
    return loss.detach(), torch.autograd.grad(loss, images)[0]
