# SPDX-License-Identifier: Apache-2.0
"""What a student is compared with its teacher by: pure functions of two tensors, each a scalar.

The teacher's tensor comes first in every divergence, KL(teacher || student), since it is the one that is to be
imitated, and second in every signature, since the student's is the one that has gradients. Half precision is widened: a
softmax over ten thousand positions does not fit into it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attention_map", "attention_rows", "cosine", "cross_image", "cwd", "kl", "memory", "mse"]


def kl(student: Tensor, teacher: Tensor, temperature: float = 4.0, axis: int = 1) -> Tensor:
    """KL on logits: T² KL(softmax(z_t / T) || softmax(z_s / T)) over the classes on `axis`, mean over all else.

    T² keeps the gradient's size as T grows (Hinton et al. 2015, arXiv 1503.02531, section 2.1). In nats.

    >>> teacher = torch.tensor([[2.0, 0.0]])
    >>> float(kl(teacher, teacher)), round(float(kl(torch.zeros(1, 2), teacher, temperature=1.0)), 4)
    (0.0, 0.3278)
    """
    return temperature**2 * _divergence(student, teacher, temperature, axis).mean()


def cwd(student: Tensor, teacher: Tensor, temperature: float = 4.0, axis: int = 1) -> Tensor:
    """Channel-wise: T² / C Σ_c KL(teacher's map of channel c || student's), mean over the batch, which is axis 0.

    A map is the softmax at temperature T over all positions of a channel (Shu et al. 2021, arXiv 2011.13256, equations
    3 and 4), so that what counts is where a channel answers and not how strongly. Both are (B, ..., C, ...) with C on
    `axis` and at least one axis of positions.

    >>> maps = torch.randn(2, 3, 4, 4)
    >>> float(cwd(maps + 5.0, maps)) < 1e-6
    True
    """
    student, teacher = (x.movedim(axis, 1).flatten(2) for x in (student, teacher))
    return temperature**2 * _divergence(student, teacher, temperature, -1).mean()


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of features (FitNets, Romero et al. 2015, arXiv 1412.6550, equation 3, as a mean)."""
    return F.mse_loss(_full(student), _full(teacher))


def cosine(student: Tensor, teacher: Tensor, axis: int = 1) -> Tensor:
    """1 - cos of the feature vectors on `axis`, mean over all positions: from 0 to 2, whatever the features' scale."""
    return (1 - F.cosine_similarity(_full(student), _full(teacher), dim=axis)).mean()


def attention_map(student: Tensor, teacher: Tensor, power: float = 2.0, axis: int = 1) -> Tensor:
    """Attention transfer: the squared distance of the maps Q = Σ_c |F_c|^p, each of length 1; mean over the batch.

    Channels are summed over, so that widths may differ without a projection (Zagoruyko & Komodakis 2017, arXiv
    1612.03928, equation 2, with the squared norm; their code divides by the number of positions too). From 0 to 2.
    """
    student, teacher = (F.normalize(_full(x).abs().pow(power).sum(axis).flatten(1)) for x in (student, teacher))
    return (student - teacher).square().sum(1).mean()


def attention_rows(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher's row || student's) of attention probabilities (B, heads, queries, keys), mean over all rows.

    Rows are what a softmax gave: they sum to 1, and where the teacher's is zero (a causal mask) nothing is asked.
    """
    student, teacher = _full(student), _full(teacher)
    # A masked key is an exact zero on both sides; its logarithm is never looked at, but must be a number.
    logarithm = student.clamp_min(torch.finfo(student.dtype).tiny).log()
    return F.kl_div(logarithm, teacher, reduction="none").sum(-1).mean()


def cross_image(student: Tensor, teacher: Tensor, temperature: float = 0.1) -> Tensor:
    """CIRKD's mini-batch pixel-to-pixel loss over all pairs (i, j) of the N images of a batch, i = j included.

    1/N² Σ_ij 1/A Σ_a KL(softmax(T_i T_jᵀ / τ)_a || softmax(S_i S_jᵀ / τ)_a) for embeddings (N, A, d) of length 1 (Yang
    et al. 2022, arXiv 2204.06986, equations 5 and 6). Time and memory grow with (N A)²; the teacher's d may differ.
    """
    student, teacher = _full(student), _full(teacher)
    rows = [
        _divergence(torch.einsum("ad,nbd->anb", s, student), torch.einsum("ad,nbd->anb", t, teacher), temperature, -1)
        for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(rows).mean()


def memory(student: Tensor, teacher: Tensor, contrast: Tensor, temperature: float = 0.1) -> Tensor:
    """CIRKD's memory losses: how each anchor lies to remembered embeddings of the teacher, in student and teacher.

    1/A Σ_a KL(softmax(T Vᵀ / τ)_a || softmax(S Vᵀ / τ)_a) for anchors (A, d) and a memory V (K, d), all of length 1
    (Yang et al. 2022, arXiv 2204.06986, equations 8 to 11: V holds pixels, or regions). Zero without anchors or memory.
    """
    student, teacher, contrast = _full(student), _full(teacher), _full(contrast)
    if not len(student) or not len(contrast):
        return student.sum() * 0.0
    return _divergence(student @ contrast.T, teacher @ contrast.T, temperature, 1).mean()


def _divergence(student: Tensor, teacher: Tensor, temperature: float, axis: int) -> Tensor:
    """KL(softmax(teacher / T) || softmax(student / T)) along an axis, which goes."""
    student, teacher = (F.log_softmax(_full(x) / temperature, dim=axis) for x in (student, teacher))
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(axis)


def _full(x: Tensor) -> Tensor:
    return x.float() if x.element_size() < 4 else x
