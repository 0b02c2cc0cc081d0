"""W' formed once for several passes: the gradients of the factors are those of forming it anew in each."""

import pytest
import torch
from tiny import tiny_config, tiny_model
from torch import nn

from xdiffusion.lora import apply_lora_to_model, set_lora_enabled
from xdiffusion.lora.formed_weights import LARGEST_WEIGHT, formed_once, layers_to_form
from xdiffusion.lora.inject import lora_layers

VARIANTS = [{}, {"use_dora": True}, {"init": "pissa"}, {"use_rslora": True, "init": "orthogonal"}]


def small_network(**settings) -> nn.Module:
    """A convolution, a grouped one and a linear layer, with an adapter whose B is not zero."""
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(1), nn.Linear(16, 3)
    network = apply_lora_to_model(nn.Sequential(*layers), 2, 4.0, target_modules="all", **settings)
    for p in network.parameters():
        if p.requires_grad:
            p.data.add_(0.1 * torch.randn_like(p))
    return network


def gradients(network: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    network.zero_grad()
    return found


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_two_passes_give_the_gradients_of_two_passes(settings):
    network = small_network(**settings).double()
    xs = torch.randn(2, 5, 2, 4, 4, dtype=torch.float64)
    for x in xs:
        network(x).square().sum().backward()
    expected = gradients(network)
    layers = layers_to_form(network)
    assert len(layers) == 3
    with formed_once(layers) as weights:
        for x in xs:
            network(x).square().sum().backward()
        assert all(w.grad is not None for w in weights) and all(g is None for g in gradients(network).values())
    found = gradients(network)
    assert found.keys() == expected.keys() and len(found) >= 6
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_afterwards_the_layers_follow_their_factors_again():
    network, x = small_network(), torch.randn(1, 2, 4, 4)
    with pytest.raises(ZeroDivisionError), formed_once(layers_to_form(network)):
        raise ZeroDivisionError
    before = network(x)
    next(p for p in network.parameters() if p.requires_grad).data.add_(1.0)
    assert not torch.equal(network(x), before)


def test_a_weight_that_no_pass_reaches_leaves_its_factors_without_a_gradient():
    network = small_network()
    with formed_once(layers_to_form(network)):
        network[0](torch.randn(1, 2, 4, 4)).sum().backward()
    reached = {name.split(".")[0] for name, gradient in gradients(network).items() if gradient is not None}
    assert reached == {"0"}


def test_where_no_adapter_is_on_nothing_is_formed():
    network = small_network()
    set_lora_enabled(network, False)
    with formed_once(layers_to_form(network)) as weights:
        assert weights == []


def test_only_small_weights_without_dropout_that_show_the_updates_are_formed():
    config = tiny_config()
    assert layers_to_form(tiny_model(config)) == []
    formed = layers_to_form(apply_lora_to_model(tiny_model(config), rank=2))
    assert len(formed) == len(list(lora_layers(apply_lora_to_model(tiny_model(config), rank=2)))) > 0
    assert layers_to_form(apply_lora_to_model(tiny_model(config), rank=2, dropout=0.1)) == []
    assert layers_to_form(apply_lora_to_model(tiny_model(config).bfloat16(), rank=2)) == []
    large = nn.Sequential(nn.Linear(LARGEST_WEIGHT // 64 + 1, 64))
    assert layers_to_form(apply_lora_to_model(large, rank=2, target_modules="all-linear")) == []
