"""Merging LoRAs, cutting their rank and distilling them from full fine-tunes: linear algebra on the factors.

    exact      D = sum_i w_i delta_i,    delta_i = s_i B_i A_i with s_i the scaling of [LoRA] section 4.1
    concat     B = [w_1 s_1 B_1, w_2 s_2 B_2, ...], A = [A_1; A_2; ...]: B A = D, and the ranks add up
    svd        the B A of a given rank that is nearest to D: the largest singular values of D = U S V^T ([EckartYoung])
    legacy     B = sum_i w_i s_i B_i, A = sum_i w_i A_i: what lora_add did for years, and not D. Its product
               sum_ij w_i w_j s_i B_i A_j has cross terms that mean nothing, and w_i^2 where w_i belongs

Weights are folded into B, and the result's lora_alpha is its rank, so that its scaling is 1. All sums are taken in
float64, and what comes out is float32. Convolutions are matrices over patches: (out, in * kernel).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from xdiffusion.checkpoints.drawing_settings import drawn_otherwise
from xdiffusion.checkpoints.lora_file import LoRAFactors, LoRAFile
from xdiffusion.lora.settings import LoRAError

METHODS = ("concat", "svd", "legacy")
PREDICTED = ("modelspec.prediction_type", "ss_zero_terminal_snr")  # how kohya's header says what our config does
Progress = Callable[[Iterable[str]], Iterable[str]]


def merge_loras(
    loras: Sequence[tuple[LoRAFile, float]],
    method: str = "concat",
    *,
    rank: int | None = None,
    energy: float | None = None,
    progress: Progress = iter,
) -> tuple[LoRAFile, dict[str, float]]:
    """One LoRA whose update is the weighted sum of several; of a single LoRA with "svd", that LoRA at another rank.

    Args:
        loras: each with its weight; a module that one of them lacks has no update there.
        method: of METHODS; see the head of this file.
        rank, energy: for "svd", one of them: the rank of every module, or the share of the squared singular values
            that each module keeps, in (0, 1], which gives each a rank of its own.
        progress: wrapped around the module names, as tqdm is.

    Returns:
        The merged LoRA, whose repairs are the learned words that had to be renamed, and by module |result - D| / |D|
        (Frobenius norms); with "svd" the square of it is the discarded share of the energy.

    Raises:
        LoRAError: for an unknown method, a wrong rank or energy, factors that do not fit together, or a DoRA module;
            for LoRAs that were trained for different predictions or schedules, see `drawn_by`.
    """
    _check_choice(method, rank, energy)
    config = _common_config([lora for lora, _ in loras])
    headers = [lora.metadata for lora, _ in loras]
    merged, errors = {}, {}
    for name in progress(dict.fromkeys(name for lora, _ in loras for name in lora.modules)):
        parts = [(lora.modules[name], weight) for lora, weight in loras if name in lora.modules]
        if method == "legacy" and len(parts) < len(loras):
            raise LoRAError(f"legacy merging needs the same modules in every LoRA, and {name} is not in all of them")
        merged[name] = merge_factors(name, parts, method, rank=rank, energy=energy)
        errors[name] = relative_error(merged[name], parts)
    hashes = {lora.base_hash for lora, _ in loras}
    samples = {name: values for lora, _ in loras for name, values in lora.base_sample.items()}
    tokens, renamed = joined_tokens([(name, lora.tokens) for name, lora in _with_names([lora for lora, _ in loras])])
    return LoRAFile(
        with_one_alpha(merged),
        tokens=tokens,
        metadata={key: text for key, text in headers[0].items() if all(h.get(key) == text for h in headers)},
        repairs=tuple(renamed),
        base_hash=next(iter(hashes)) if len(hashes) == 1 else None,
        base_sample=samples if len(hashes) == 1 else {},
        config=config,
        step=max(lora.step for lora, _ in loras),
    ), errors


def with_one_alpha(modules: Mapping[str, LoRAFactors]) -> dict[str, LoRAFactors]:
    """The same updates with the largest rank for lora_alpha in all modules: diffusers reads one of a kohya file's alphas."""
    alpha = float(max((factors.rank for factors in modules.values()), default=1))
    return {
        name: replace(f, lora_B=f.lora_B * (f.scaling * f.rank / alpha), lora_alpha=alpha, use_rslora=False)
        for name, f in modules.items()
    }


def merge_factors(
    name: str,
    parts: Sequence[tuple[LoRAFactors, float]],
    method: str,
    *,
    rank: int | None = None,
    energy: float | None = None,
) -> LoRAFactors:
    """`merge_loras` for the factors of one module, which is called `name` in errors."""
    if not all(math.isfinite(f.scaling) and f.lora_A.isfinite().all() and f.lora_B.isfinite().all() for f, _ in parts):
        raise LoRAError(f"the factors of {name} are not finite")
    if not all(math.isfinite(weight) for _, weight in parts):
        raise LoRAError(f"the weights of a merge must be finite numbers, not {', '.join(str(w) for _, w in parts)}")
    if any(factors.magnitude is not None for factors, _ in parts):
        raise LoRAError(
            f"{name} is DoRA, whose update is no product B A and cannot be summed; fold it into its base "
            "(lora apply, or lora_add --mode upl for a folder of diffusers) and distil the result (lora extract)"
        )
    shape = max((factors.lora_A.shape[1:] for factors, _ in parts), key=len)  # 1x1 kernels are left out by some tools
    sizes = {(f.lora_B.shape[0], f.lora_A[0].numel()) for f, _ in parts}
    if len(sizes) > 1:
        raise LoRAError(f"the LoRAs are for different models: {name} is (out, in) = {' and '.join(map(str, sizes))}")
    if method == "legacy":
        if len({factors.rank for factors, _ in parts}) > 1:
            raise LoRAError(f"legacy merging adds factors, so the ranks must be equal; those of {name} are not")
        flat = [_flat(factors) for factors, _ in parts]
        lora_B = sum(weight * f.scaling * B for (f, weight), (B, _) in zip(parts, flat))
        lora_A = sum(weight * A for (_, weight), (_, A) in zip(parts, flat))
    else:
        lora_B, lora_A = concatenated(parts)
        full_rank = min(sizes.pop())
        if method == "svd":
            lora_B, lora_A = cut(svd_of_product(lora_B, lora_A), rank=rank, energy=energy)
        elif lora_A.shape[0] > full_rank:  # more than any matrix of this size has: the SVD says the same with less
            lora_B, lora_A = cut(svd_of_product(lora_B, lora_A), rank=full_rank)
    return _factors(lora_B, lora_A, shape)


def extract_factors(delta: Tensor, *, rank: int | None = None, energy: float | None = None) -> tuple[LoRAFactors, float]:
    """The LoRA nearest to a full update W_tuned - W_base, and the share of the energy that it discards.

    Args:
        delta: (out, in, *kernel).
        rank, energy: see `merge_loras`.

    Raises:
        LoRAError: for a wrong rank or energy.
    """
    _check_choice("svd", rank, energy)
    svd = svd_of_matrix(delta.double().flatten(1))
    lora_B, lora_A = cut(svd, rank=rank, energy=energy)
    energies = svd[1].square()
    discarded = energies[lora_A.shape[0] :].sum() / energies.sum()
    return _factors(lora_B, lora_A, delta.shape[1:]), float(discarded.nan_to_num())


def concatenated(parts: Sequence[tuple[LoRAFactors, float]]) -> tuple[Float[Tensor, "O R"], Float[Tensor, "R I"]]:
    """(B, A) of the summed ranks with B A = sum of weight * delta, float64."""
    flat = [_flat(factors) for factors, _ in parts]
    lora_B = torch.cat([weight * f.scaling * B for (f, weight), (B, _) in zip(parts, flat)], dim=1)
    return lora_B, torch.cat([A for _, A in flat])


def svd_of_product(
    lora_B: Float[Tensor, "O R"], lora_A: Float[Tensor, "R I"]
) -> tuple[Float[Tensor, "O K"], Float[Tensor, " K"], Float[Tensor, "K I"]]:
    """U, S, V^T of B A, K = min(O, R, I) values, without the (O, I) matrix: only an (R, R) one is decomposed.

    B = Q_B R_B and A^T = Q_A R_A, so B A = Q_B (R_B R_A^T) Q_A^T, and the Q only turn the singular vectors of the middle.
    """
    Q_B, R_B = torch.linalg.qr(lora_B)
    Q_A, R_A = torch.linalg.qr(lora_A.T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return Q_B @ U, S, Vh @ Q_A.T


def svd_of_matrix(
    matrix: Float[Tensor, "O I"],
) -> tuple[Float[Tensor, "O K"], Float[Tensor, " K"], Float[Tensor, "K I"]]:
    """U, S, V^T of a full matrix in float64, K = min(O, I), from the eigenvectors of its smaller Gram matrix.

    M M^T = U S^2 U^T and U^T M = S V^T. Four times as fast as torch.linalg.svd where one side is much longer, as with
    convolutions; singular values below 1e-8 of the largest drown in rounding, which is far below what anyone keeps.
    """
    if matrix.shape[0] > matrix.shape[1]:
        V, S, Uh = svd_of_matrix(matrix.T)
        return Uh.T, S, V.T
    U = torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(1)  # eigh sorts upwards
    scaled = U.T @ matrix
    S = scaled.norm(dim=1)
    return U, S, scaled / S.clamp(min=torch.finfo(S.dtype).tiny)[:, None]


def cut(
    svd: tuple[Float[Tensor, "O K"], Float[Tensor, " K"], Float[Tensor, "K I"]],
    *,
    rank: int | None = None,
    energy: float | None = None,
) -> tuple[Float[Tensor, "O R"], Float[Tensor, "R I"]]:
    """(B, A) of the largest singular values: `rank` of them, or as many as hold the share `energy` of sum S^2.

    S is split evenly, B = U sqrt(S) and A = sqrt(S) V^T, so that neither factor is too small for float16.
    """
    U, S, Vh = svd
    if rank is None:
        held = S.square().cumsum(0)
        rank = 1 + int((held < energy * held[-1]).sum())
    root = S[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * Vh[:rank]


def joined_tokens(parts: Sequence[tuple[object, Mapping[str, Tensor]]]) -> tuple[dict[str, Tensor], list[str]]:
    """The learned words of several LoRAs, and a line for each that had to be called otherwise.

    A name that stands for another vector already, in whatever case, gets the number of its LoRA, or the next that is free:
    <s1> -> <s1-2>.

    Args:
        parts: what a line calls it, and its words.
    """
    tokens: dict[str, Tensor] = {}
    taken: dict[str, Tensor] = {}
    renamed = []
    for number, (source, words) in enumerate(parts, start=1):
        for word, vector in words.items():
            name, free, rows = word, number, torch.atleast_2d(vector)
            while not torch.equal(taken.setdefault(name.lower(), rows), rows):
                name = f"{word[:-1]}-{free}>" if word.endswith(">") else f"{word}-{free}"
                free += 1
            tokens[name] = vector
            if name != word:
                renamed.append(f"{word} of {source} is called {name}: another {word} was there before")
    return tokens, renamed


def relative_error(result: LoRAFactors, parts: Sequence[tuple[LoRAFactors, float]]) -> float:
    """|delta of result - sum of weight * delta| / |sum of weight * delta|, Frobenius norms; 0 / 0 is 0.

    A sum that is rounding alone, of updates that take each other away, is 0.
    """
    lora_B, lora_A = concatenated(parts)
    difference_B, difference_A = concatenated([(result, 1.0), *((factors, -weight) for factors, weight in parts)])
    difference = product_norm(difference_B, difference_A)
    rounding = 1e-12 * sum(abs(weight) * delta_norm(factors) for factors, weight in parts)
    return difference / product_norm(lora_B, lora_A) if difference > rounding else 0.0


def delta_norm(factors: LoRAFactors) -> float:
    """|scaling B A|, the Frobenius norm of the update (for DoRA: of its low-rank part)."""
    return product_norm(*concatenated([(factors, 1.0)]))


def product_norm(lora_B: Float[Tensor, "O R"], lora_A: Float[Tensor, "R I"]) -> float:
    """|B A|, Frobenius, without the product: |R_B R_A^T| of the QR decompositions of B and A^T."""
    R_B, R_A = (torch.linalg.qr(matrix, mode="r").R for matrix in (lora_B, lora_A.T))
    return float((R_B @ R_A.T).norm())


def _flat(factors: LoRAFactors) -> tuple[Tensor, Tensor]:
    return factors.lora_B.double().flatten(1), factors.lora_A.double().flatten(1)


def _factors(lora_B: Tensor, lora_A: Tensor, shape: Sequence[int]) -> LoRAFactors:
    """Factors of scaling 1 in the shapes of a layer whose weight is (out, *shape)."""
    rank, ones = lora_A.shape[0], [1] * (len(shape) - 1)
    return LoRAFactors(lora_A.float().view(rank, *shape), lora_B.float().view(-1, rank, *ones), float(rank))


def _check_choice(method: str, rank: int | None, energy: float | None) -> None:
    if method not in METHODS:
        raise LoRAError(f"merge method {method!r} is none of {', '.join(METHODS)}")
    given = [choice for choice in (rank, energy) if choice is not None]
    if len(given) != (method == "svd"):
        raise LoRAError(f"a rank or an energy, and not both, goes with svd and with no other method; method: {method}")
    if rank is not None and rank < 1:
        raise LoRAError(f"rank={rank} must be at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise LoRAError(f"energy={energy} must be in (0, 1]")


def _with_names(loras: Sequence[LoRAFile]) -> list[tuple[object, LoRAFile]]:
    """With what a message calls each."""
    return [(lora.path or f"LoRA {number}", lora) for number, lora in enumerate(loras, start=1)]


def _common_config(loras: Sequence[LoRAFile]) -> Mapping[str, Any] | None:
    """The config of the first that has one; the sum of updates for two predictions is an update for neither."""
    said = [(name, lora.config) for name, lora in _with_names(loras) if lora.config]
    for path, config in said[1:]:
        for key, ours, theirs in drawn_otherwise(said[0][1], config):
            raise LoRAError(
                f"LoRAs that were trained for different things do not add up: {key}={ours!s:.100} in {said[0][0]}, "
                f"{theirs!s:.100} in {path}"
            )
    for key in PREDICTED:
        words = {str(lora.metadata[key]): name for name, lora in _with_names(loras) if key in lora.metadata}
        if len(words) > 1:
            what = ", ".join(f"{word!s:.40} in {name}" for word, name in words.items())
            raise LoRAError(f"LoRAs that were trained for different things do not add up: {key}={what}")
    return said[0][1] if said else None
