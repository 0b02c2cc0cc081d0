"""Merging, cutting and distilling updates, each computed a second way from the full matrices."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from xdiffusion.checkpoints.lora_file import LoRAFactors, LoRAFile
from xdiffusion.lora import merge
from xdiffusion.lora.settings import LoRAError

SHAPES = {"linear": (12, 20), "tall": (30, 5), "conv2d": (10, 6, 3, 3), "conv1d": (8, 6, 3)}


def factors(shape, rank=4, alpha=6.0, seed=0, dtype=torch.float32, **kwargs) -> LoRAFactors:
    generator = torch.Generator().manual_seed(seed)
    lora_A = torch.randn(rank, *shape[1:], generator=generator)
    lora_B = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator)
    return LoRAFactors(lora_A.to(dtype), lora_B.to(dtype), alpha, **kwargs)


def lora_file(seed=0, shapes=SHAPES, **kwargs) -> LoRAFile:
    return LoRAFile({name: factors(shape, seed=seed + i, **kwargs) for i, (name, shape) in enumerate(shapes.items())})


def weighted_sum(*parts: tuple[LoRAFile, float]) -> dict[str, Tensor]:
    names = dict.fromkeys(name for lora, _ in parts for name in lora.modules)
    return {n: sum(w * lora.modules[n].delta(torch.float64) for lora, w in parts if n in lora.modules) for n in names}


def relative(result: Tensor, exact: Tensor) -> float:
    return float((result - exact).norm() / exact.norm())


# --- merging ---


@pytest.mark.parametrize("method", merge.METHODS)
@pytest.mark.parametrize("what", ["lora_A", "lora_B", "lora_alpha"])
def test_factors_that_are_not_finite_are_named(what, method):
    damaged = factors(SHAPES["linear"])
    bad = torch.inf if what == "lora_alpha" else getattr(damaged, what).index_fill(0, torch.tensor(0), torch.nan)
    lora = LoRAFile({"linear": replace(damaged, **{what: bad})})
    with pytest.raises(LoRAError, match="the factors of linear are not finite"):
        merge.merge_loras([(lora, 1.0)], method, rank=2 if method == "svd" else None)


def test_concat_is_the_sum_for_every_kernel_rank_alpha_and_sign():
    parts = [
        (lora_file(seed=1), 0.7),
        (lora_file(seed=2, rank=2, alpha=1.0), -1.3),
        (lora_file(seed=3, rank=3, use_rslora=True, dtype=torch.float16), 0.25),
    ]
    merged, errors = merge.merge_loras(parts)
    for name, exact in weighted_sum(*parts).items():
        assert merged.modules[name].delta(torch.float64).shape == SHAPES[name]
        assert relative(merged.modules[name].delta(torch.float64), exact) < 2e-7
        assert errors[name] < 2e-7
    assert merged.modules["linear"].rank == 9
    assert merged.modules["tall"].rank == 5  # no matrix of (30, 5) has more
    assert {f.lora_alpha for f in merged.modules.values()} == {9.0}  # diffusers reads one of a kohya file's alphas


def test_what_takes_itself_away_has_no_error():
    lora = lora_file(seed=1)
    _, errors = merge.merge_loras([(lora, 1.0), (lora, -1.0)])
    assert set(errors.values()) == {0.0}


def test_a_header_is_kept_where_the_parts_agree_and_predictions_have_to():
    said = {"ss_tag": "fox", "ss_clip_skip": "2", "modelspec.prediction_type": "v"}
    first, second = (replace(lora_file(seed=s), metadata=said | {"ss_tag": tag}) for s, tag in ((1, "fox"), (2, "hen")))
    merged, _ = merge.merge_loras([(first, 1.0)], "svd", rank=1)
    assert merged.metadata == said
    merged, _ = merge.merge_loras([(first, 0.5), (second, 0.5)])
    assert merged.metadata == {"ss_clip_skip": "2", "modelspec.prediction_type": "v"}
    other = replace(second, metadata={"modelspec.prediction_type": "epsilon"})
    with pytest.raises(LoRAError, match=r"modelspec.prediction_type=v in LoRA 1, epsilon in LoRA 2"):
        merge.merge_loras([(first, 0.5), (other, 0.5)])


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_svd_is_the_nearest_matrix_of_its_rank(rank):
    """Against torch.linalg.svd of the full sum; the discarded energy is the square of the error (Eckart-Young)."""
    parts = [(lora_file(seed=1), 0.7), (lora_file(seed=2, rank=2), 0.3)]
    merged, errors = merge.merge_loras(parts, "svd", rank=rank)
    for name, exact in weighted_sum(*parts).items():
        U, S, Vh = torch.linalg.svd(exact.flatten(1), full_matrices=False)
        nearest = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        assert merged.modules[name].rank == rank
        assert relative(merged.modules[name].delta(torch.float64).flatten(1), nearest) < 5e-7
        discarded = float(S[rank:].square().sum() / S.square().sum())
        assert errors[name] ** 2 == pytest.approx(discarded, abs=1e-12)


def test_energy_takes_the_fewest_singular_values_that_hold_it():
    lora = lora_file(seed=5, rank=5)
    merged, errors = merge.merge_loras([(lora, 1.0)], "svd", energy=0.8)
    for name, exact in weighted_sum((lora, 1.0)).items():
        S = torch.linalg.svdvals(exact.flatten(1))
        held = (S.square().cumsum(0) / S.square().sum()).tolist()
        assert merged.modules[name].rank == next(i for i, share in enumerate(held, start=1) if share >= 0.8)
        assert errors[name] ** 2 <= 0.2
    assert len({f.rank for f in merged.modules.values()}) > 1


def test_a_large_enough_rank_or_all_the_energy_keeps_the_update():
    lora = lora_file(seed=6, rank=3)
    for choice in ({"rank": 100}, {"energy": 1.0}):
        merged, errors = merge.merge_loras([(lora, 1.0)], "svd", **choice)
        assert max(errors.values()) < 2e-7
        assert all(f.rank <= 5 for f in merged.modules.values())


def test_legacy_is_the_factor_wise_rule_with_its_cross_terms():
    first, second = lora_file(seed=1, alpha=4.0), lora_file(seed=2, alpha=4.0)
    merged, errors = merge.merge_loras([(first, 0.3), (second, 0.7)], "legacy")
    for name, result in merged.modules.items():
        (A1, B1), (A2, B2) = ((f.lora_A.flatten(1), f.lora_B.flatten(1)) for f in (first.modules[name], second.modules[name]))
        expanded = 0.09 * B1 @ A1 + 0.49 * B2 @ A2 + 0.21 * (B1 @ A2 + B2 @ A1)
        assert relative(result.delta().flatten(1), expanded) < 1e-6
        assert errors[name] == pytest.approx(relative(expanded, (0.3 * B1 @ A1 + 0.7 * B2 @ A2)), rel=1e-4)
        assert errors[name] > 0.3


def test_legacy_depends_on_the_factorisation_and_concat_does_not():
    first, second = lora_file(seed=1, alpha=4.0), lora_file(seed=2, alpha=4.0)
    same = LoRAFile({n: LoRAFactors(-f.lora_A, -f.lora_B, 4.0) for n, f in second.modules.items()})
    for method, differs in (("legacy", True), ("concat", False)):
        results = [merge.merge_loras([(first, 0.5), (other, 0.5)], method)[0] for other in (second, same)]
        deltas = [results[i].modules["linear"].delta() for i in range(2)]
        assert (relative(*deltas) > 0.1) == differs


@pytest.mark.parametrize(("method", "choice"), [("concat", {}), ("svd", {"rank": 4}), ("legacy", {})])
def test_a_lora_merged_with_itself_half_and_half_is_itself(method, choice):
    """The formula printed in seed 002 returns 1.5 times it."""
    lora = lora_file()
    merged, _ = merge.merge_loras([(lora, 0.5), (lora, 0.5)], method, **choice)
    for name, exact in weighted_sum((lora, 1.0)).items():
        assert relative(merged.modules[name].delta(torch.float64), exact) < 5e-7


def test_a_module_that_one_lora_lacks_is_taken_from_the_others():
    first, second = lora_file(shapes={"linear": SHAPES["linear"]}), lora_file(seed=3)
    merged, _ = merge.merge_loras([(first, 0.5), (second, 2.0)])
    assert list(merged.modules) == list(SHAPES)
    assert relative(merged.modules["conv2d"].delta(), 2 * second.modules["conv2d"].delta()) < 1e-6
    with pytest.raises(LoRAError, match="same modules"):
        merge.merge_loras([(first, 0.5), (second, 0.5)], "legacy")


def test_a_linear_spelling_of_a_1x1_convolution_merges_with_the_other():
    conv, linear = factors((6, 5, 1, 1), seed=1), factors((6, 5), seed=2)
    merged = merge.merge_factors("proj_in", [(linear, 1.0), (conv, 1.0)], "concat")
    assert merged.delta().shape == (6, 5, 1, 1)
    assert relative(merged.delta()[:, :, 0, 0], conv.delta()[:, :, 0, 0] + linear.delta()) < 1e-6


def _drawn(prediction, **schedule):
    return {"diffusion": {"prediction": prediction, "schedule": {"kind": "betas"} | schedule}}


@pytest.mark.parametrize(
    ("config", "other", "message"),
    [
        (_drawn("eps"), _drawn("v"), "diffusion.prediction=eps in LoRA 1, v in LoRA 3"),
        (_drawn("v"), _drawn("v", zero_terminal_snr=True), "zero_terminal_snr=None in LoRA 1, True in LoRA 3"),
        (_drawn("v"), _drawn("v", zero_terminal_snr=False), ""),
        (_drawn("v"), None, ""),
        (None, _drawn("v"), ""),
    ],
)
def test_loras_that_draw_otherwise_do_not_merge(config, other, message):
    parts = [(replace(lora_file(seed=i), config=c), 0.5) for i, c in enumerate((config, None, other))]
    if message:
        with pytest.raises(LoRAError, match=message):
            merge.merge_loras(parts)
    else:
        assert merge.merge_loras(parts)[0].config == (config or other)


def test_origin_and_tokens_of_the_merged_lora():
    vector = torch.ones(3)
    first = LoRAFile({"a": factors((4, 4))}, base_hash="x", step=3, tokens={"<s1>": vector, "<s2>": vector})
    second = LoRAFile({"a": factors((4, 4))}, base_hash="x", step=5, tokens={"<s1>": 2 * vector, "<s2>": vector})
    merged, _ = merge.merge_loras([(first, 1.0), (second, 1.0)])
    assert (merged.base_hash, merged.step, list(merged.tokens)) == ("x", 5, ["<s1>", "<s2>", "<s1-2>"])
    assert torch.equal(merged.tokens["<s1-2>"], 2 * vector)
    other = LoRAFile(second.modules, base_hash="y")
    assert merge.merge_loras([(first, 1.0), (other, 1.0)])[0].base_hash is None


def test_no_learned_word_takes_the_place_of_another():
    """Though its new name is taken too, or differs from another in its case alone, which text encoders do not see."""
    a, b, c = (i * torch.ones(3) for i in range(3))
    first = {"<s1>": a, "<s1-2>": b, "<x>": a}
    tokens, renamed = merge.joined_tokens([("one.pt", first), ("two.pt", {"<s1>": c, "<X>": b, "<s1-2>": b[None]})])
    assert tokens == first | {"<s1-3>": c, "<X-2>": b, "<s1-2>": tokens["<s1-2>"]}
    assert torch.equal(tokens["<s1-2>"].flatten(), b)
    assert renamed == [
        "<s1> of two.pt is called <s1-3>: another <s1> was there before",
        "<X> of two.pt is called <X-2>: another <X> was there before",
    ]


def test_zero_updates_have_no_error():
    zero = LoRAFactors(torch.ones(2, 4), torch.zeros(4, 2), 2.0)
    for method, choice in (("concat", {}), ("svd", {"rank": 1}), ("svd", {"energy": 0.9})):
        merged, errors = merge.merge_loras([(LoRAFile({"a": zero}), 1.0)], method, **choice)
        assert errors == {"a": 0.0}
        assert not merged.modules["a"].delta().any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "mean"}, "none of concat, svd, legacy"),
        ({"method": "svd"}, "rank or an energy"),
        ({"method": "svd", "rank": 2, "energy": 0.5}, "not both"),
        ({"method": "concat", "rank": 2}, "no other method"),
        ({"method": "svd", "rank": 0}, "at least 1"),
        ({"method": "svd", "energy": 1.5}, r"in \(0, 1\]"),
    ],
)
def test_wrong_choices_are_named(arguments, message):
    with pytest.raises(LoRAError, match=message):
        merge.merge_loras([(lora_file(), 1.0)], **arguments)


def test_factors_that_do_not_fit_are_named():
    first = LoRAFile({"layer": factors((4, 4))})
    with pytest.raises(LoRAError, match=r"layer is \(out, in\) = "):
        merge.merge_loras([(first, 1.0), (LoRAFile({"layer": factors((4, 6))}), 1.0)])
    with pytest.raises(LoRAError, match="ranks must be equal"):
        merge.merge_loras([(first, 1.0), (LoRAFile({"layer": factors((4, 4), rank=2)}), 1.0)], "legacy")
    with pytest.raises(LoRAError, match="layer is DoRA"):
        merge.merge_loras([(LoRAFile({"layer": factors((4, 4), magnitude=torch.ones(4))}), 1.0)])


# --- the linear algebra ---


@pytest.mark.parametrize(("out", "rank", "inner"), [(40, 4, 30), (5, 8, 30), (30, 8, 5), (6, 20, 6), (7, 1, 7)])
def test_the_svd_of_a_product_is_that_of_the_full_matrix(out, rank, inner):
    generator = torch.Generator().manual_seed(0)
    B = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    A = torch.randn(rank, inner, generator=generator, dtype=torch.float64)
    U, S, Vh = merge.svd_of_product(B, A)
    expected = torch.linalg.svdvals(B @ A)
    assert torch.allclose(S, expected[: len(S)], atol=1e-12)
    assert torch.allclose((U * S) @ Vh, B @ A, atol=1e-12)
    for basis in (U, Vh.T):
        assert torch.allclose(basis.T @ basis, torch.eye(len(S), dtype=S.dtype), atol=1e-12)
    assert merge.product_norm(B, A) == pytest.approx(float((B @ A).norm()), rel=1e-13)


@pytest.mark.parametrize("shape", [(8, 30), (30, 8), (9, 9)])
def test_the_svd_by_the_gram_matrix_is_torchs(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U, S, Vh = merge.svd_of_matrix(matrix)
    assert torch.allclose(S, torch.linalg.svdvals(matrix), atol=1e-12)
    assert torch.allclose((U * S) @ Vh, matrix, atol=1e-12)


def test_the_norm_of_a_small_difference_is_not_lost_in_rounding():
    """By Gram matrices, |B A|^2 = tr(B^T B A A^T), it would be lost below 1e-8 of the terms."""
    exact = factors((50, 40), rank=4, alpha=4.0)
    off = LoRAFactors(exact.lora_A.double() * (1 + 1e-12), exact.lora_B, 4.0)
    assert merge.relative_error(off, [(exact, 1.0)]) == pytest.approx(1e-12, rel=1e-2)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (10, 6, 3, 3)])
def test_extraction_finds_a_low_rank_update_and_cuts_a_full_one(shape):
    update = factors(shape, rank=3).delta()
    found, discarded = merge.extract_factors(update, energy=1 - 1e-9)
    assert (found.rank, found.scaling) == (3, 1.0)
    assert relative(found.delta(), update) < 1e-6
    assert discarded < 1e-9
    full = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    cut, discarded = merge.extract_factors(full, rank=4)
    S = torch.linalg.svdvals(full.double().flatten(1))
    assert discarded == pytest.approx(float(S[4:].square().sum() / S.square().sum()), rel=1e-6)
    assert relative(cut.delta(), full) ** 2 == pytest.approx(discarded, rel=1e-4)
    with pytest.raises(LoRAError, match="at least 1"):
        merge.extract_factors(full, rank=0)


def test_a_cut_splits_the_singular_values_evenly():
    lora_B, lora_A = merge.cut(merge.svd_of_product(*merge.concatenated([(factors((12, 20)), 1.0)])), rank=3)
    assert torch.allclose(lora_B.norm(dim=0), lora_A.norm(dim=1))
