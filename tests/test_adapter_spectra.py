"""The measurements of adapters against their definitions, computed with the full matrices."""

import math

import pytest
import torch

from xdiffusion.lora.adapter_spectra import amplification, delta_singular_values, subspace_similarity

SHAPES = [(12, 20, 3), (20, 12, 5), (4, 30, 6), (30, 4, 6)]  # out, in, rank; the last two above one side


def factors(out_size: int, in_size: int, rank: int, generator: torch.Generator):
    return torch.randn(out_size, rank, generator=generator), torch.randn(rank, in_size, generator=generator)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_values_are_those_of_the_product(shape, generator):
    lora_B, lora_A = factors(*shape, generator)
    values = delta_singular_values(lora_B, lora_A, scaling=-0.7)
    full = torch.linalg.svdvals(-0.7 * lora_B.double() @ lora_A.double())
    assert len(values) == min(shape)
    assert torch.allclose(values, full[: len(values)])


@pytest.mark.parametrize(("rows_1", "rows_2", "columns"), [(3, 5, 20), (5, 3, 20), (6, 6, 4)])
def test_similarity_is_equation_4(rows_1, rows_2, columns, generator):
    A_1, A_2 = (torch.randn(rows, columns, generator=generator) for rows in (rows_1, rows_2))
    phi = subspace_similarity(A_1, A_2)
    # the eigenvectors of A^T A, largest first, are the right-singular vectors
    V_1, V_2 = (torch.linalg.eigh(A.double().T @ A.double()).eigenvectors.flip(1) for A in (A_1, A_2))
    assert phi.shape == (min(rows_1, columns), min(rows_2, columns))
    for i in range(1, phi.shape[0] + 1):
        for j in range(1, phi.shape[1] + 1):
            expected = (V_1[:, :i].T @ V_2[:, :j]).norm() ** 2 / min(i, j)
            assert phi[i - 1, j - 1].item() == pytest.approx(expected.item(), abs=1e-9)


def test_similarity_of_equal_contained_and_orthogonal_subspaces(generator):
    A = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5, 0.25]))
    mixing = torch.linalg.qr(torch.randn(2, 2, generator=generator)).Q
    assert torch.allclose(subspace_similarity(A[:2], mixing @ A[:2])[1, 1], torch.tensor(1.0).double())
    assert torch.allclose(subspace_similarity(A[:2], A[:4])[:, 1:], torch.ones(2, 3).double())
    assert subspace_similarity(A[:3], A[3:]).abs().max() == 0


def test_similarity_of_random_subspaces_has_the_mean_that_is_promised(generator):
    draws = [subspace_similarity(*(torch.randn(4, 10, generator=generator) for _ in range(2))) for _ in range(2000)]
    i = torch.arange(1, 5)
    assert torch.allclose(torch.stack(draws).mean(0), torch.maximum(i[:, None], i).double() / 10, atol=0.01)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_amplification_is_that_of_the_singular_vectors(shape, generator):
    lora_B, lora_A = factors(*shape, generator)
    weight, rank = torch.randn(*shape[:2], generator=generator), min(shape)
    found = amplification(weight, lora_B, lora_A, scaling=3.0)
    delta, W = 3 * lora_B.double() @ lora_A.double(), weight.double()
    U, _, Vh = torch.linalg.svd(delta)
    in_delta = (U[:, :rank].T @ W @ Vh[:rank].T).norm().item()
    U_W, _, Vh_W = torch.linalg.svd(W)
    in_top = (U_W[:, :rank].T @ W @ Vh_W[:rank].T).norm().item()
    assert found[:3] == pytest.approx((W.norm().item(), delta.norm().item(), in_delta))
    assert found.in_top == pytest.approx(in_top)
    assert found.factor == pytest.approx(delta.norm().item() / in_delta)
    assert found.in_delta < found.in_top * (1 + 1e-9)


def test_random_directions_are_as_promised(generator):
    weight = torch.randn(6, 9, generator=generator)
    draws = [amplification(weight, *factors(6, 9, 2, generator)) for _ in range(3000)]
    mean_square = sum(draw.in_delta**2 for draw in draws) / len(draws)
    assert math.sqrt(mean_square) == pytest.approx(draws[0].in_random, rel=0.03)


def test_an_update_that_is_a_multiple_of_the_weight(generator):
    lora_B, lora_A = factors(8, 6, 2, generator)
    found = amplification(lora_B @ lora_A, lora_B, lora_A, scaling=5.0)
    assert found.factor == pytest.approx(5, rel=1e-5)
    assert found.in_delta == pytest.approx(found.weight, rel=1e-5)
    assert found.in_top == pytest.approx(found.weight, rel=1e-5)
