# SPDX-License-Identifier: Apache-2.0
"""The papers' formulas in NumPy, one loop an index: slow, plain, and sharing nothing with the code under test."""

from __future__ import annotations

import numpy as np


def softmax(z: np.ndarray) -> np.ndarray:
    """Of a vector."""
    e = np.exp(z - z.max())
    return e / e.sum()


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p || q) of two vectors, where 0 log 0 is 0."""
    return float(sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True) if a > 0))


def kl(student: np.ndarray, teacher: np.ndarray, temperature: float, axis: int) -> float:
    s, t = (np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis]) for x in (student, teacher))
    each = [divergence(softmax(b / temperature), softmax(a / temperature)) for a, b in zip(s, t, strict=True)]
    return temperature**2 * sum(each) / len(each)


def cwd(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    """Of (B, C, ...)."""
    b, c = teacher.shape[:2]
    total = 0.0
    for image in range(b):
        for channel in range(c):
            maps = (x[image, channel].reshape(-1) / temperature for x in (teacher, student))
            total += temperature**2 / c * divergence(*map(softmax, maps))
    return total / b


def cosine(student: np.ndarray, teacher: np.ndarray) -> float:
    """Of (positions, C)."""
    each = [1 - s @ t / np.sqrt((s @ s) * (t @ t)) for s, t in zip(student, teacher, strict=True)]
    return float(np.mean(each))


def attention_map(student: np.ndarray, teacher: np.ndarray, power: float) -> float:
    """Of (B, C, ...); the two may differ in C."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        maps = [sum(np.abs(channel.reshape(-1)) ** power for channel in x) for x in (s, t)]
        a, b = (m / np.sqrt((m**2).sum()) for m in maps)
        total += float(((a - b) ** 2).sum())
    return total / len(student)


def attention_rows(student: np.ndarray, teacher: np.ndarray) -> float:
    """Of (B, heads, queries, keys)."""
    s, t = (x.reshape(-1, x.shape[-1]) for x in (student, teacher))
    return float(np.mean([divergence(b, a) for a, b in zip(s, t, strict=True)]))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).sum(-1, keepdims=True))


def cross_image(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    """Of embeddings (N, A, d)."""
    n, a = student.shape[:2]
    total = 0.0
    for i in range(n):
        for j in range(n):
            for anchor in range(a):
                s = softmax(student[j] @ student[i, anchor] / temperature)
                t = softmax(teacher[j] @ teacher[i, anchor] / temperature)
                total += divergence(t, s) / a
    return total / n**2


def memory(student: np.ndarray, teacher: np.ndarray, contrast: np.ndarray, temperature: float) -> float:
    """Of anchors (A, d) and a memory (K, d)."""
    each = [
        divergence(softmax(contrast @ t / temperature), softmax(contrast @ s / temperature))
        for s, t in zip(student, teacher, strict=True)
    ]
    return sum(each) / len(each)
