"""Layers that hold a frozen weight and any number of named low-rank adapters ([LoRA] section 4.1).

    W' = W + sum_i scale_i * s_i B_i A_i,    s = lora_alpha / rank

A LoRA layer is its base class plus adapters: `LoRALinear` is an `nn.Linear`, so the names of the base weights do not
change when a model is wrapped; that of a subclass is of both classes (`subclasses`). `scale` is the strength at run time:
0 the base, 1 as trained. A convolution's A is a convolution of the same kernel to `rank` channels, its B a 1x1.

DoRA gives each output's weight the length m: W' = m (W + s B A) / |W + s B A| ([DoRA] eq. 5), and a scale between 0 and 1
lies between W and that W'. Where several adapters are on they act in the order in which they were added, each on what
those before it made of W, as in peft; DoRA's norm is taken of W alone. Without DoRA the order does not matter.

W is never changed. An adapter that starts with B = 0, DoRA too while W's dtype stays, changes no bit of the output; PiSSA,
whose B A starts as a part of W, subtracts its first product and so changes the output by rounding only: s (B A - B_0 A_0),
which is a plain LoRA of twice the rank and is saved as one.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xdiffusion.checkpoints.lora_file import LoRAFactors
from xdiffusion.lora.functional import (
    Geometry,
    Product,
    dora_weight,
    holds_updates,
    joined,
    lora_conv,
    lora_linear,
    merged_weight,
    plain_lora_conv,
    plain_lora_linear,
    row_norms,
)
from xdiffusion.lora.initialise import initial_factors
from xdiffusion.lora.settings import (
    DEFAULT_ADAPTER,
    AdapterSettings,
    Init,
    LoRAError,
    check_adapter_name,
    check_factors,
    check_settings,
)
from xdiffusion.lora.subclasses import lora_class

OWN_ATTRIBUTES = ("adapters", "keeps_weight", "kept_weight", "_compiled_call_impl")  # that a plain layer does not keep


class LoRALayer(nn.Module):
    """The adapters of one layer, mixed into the layer's own class.

    lora_A[name]: (rank, in, *kernel) and lora_B[name]: (out, rank, *ones); lora_magnitude[name]: (out,), of DoRA adapters;
    lora_A_initial[name] and lora_B_initial[name]: frozen, of PiSSA. All float32 until `model.half()` rounds them too.
    """

    weight: Tensor
    bias: Tensor | None
    base_class: type[nn.Module]
    keeps_weight = False
    kept_weight: Tensor | None = None

    def _init_adapters(self) -> None:
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.lora_magnitude = nn.ParameterDict()
        self.lora_A_initial = nn.ParameterDict()
        self.lora_B_initial = nn.ParameterDict()
        self.adapters: dict[str, AdapterSettings] = {}

    @classmethod
    def wrap(cls, layer: nn.Module) -> LoRALayer:
        """A LoRA layer without adapters that holds the very parameters, hooks and settings of `layer`."""
        kind = lora_class(cls, type(layer))
        wrapped = kind.__new__(kind)
        wrapped.__dict__ = layer.__dict__ | {"_compiled_call_impl": None}  # that is of the plain forward
        wrapped._parameters = layer._parameters.copy()
        wrapped._modules = layer._modules.copy()
        wrapped._init_adapters()
        return wrapped

    def unwrap(self) -> nn.Module:
        """The plain layer again, with the very parameters, hooks and settings of this one."""
        plain = self.base_class.__new__(self.base_class)
        plain.__dict__ = {k: v for k, v in self.__dict__.items() if k not in OWN_ATTRIBUTES}
        plain._parameters = self._parameters.copy()
        plain._modules = {k: v for k, v in self._modules.items() if not k.startswith("lora_")}
        return plain

    def add_adapter(
        self,
        name: str,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        *,
        use_rslora: bool = False,
        use_dora: bool = False,
        init: Init = "zero_b",
    ) -> None:
        """Add an adapter; see `apply_lora_to_model` and `initial_factors`.

        Raises:
            LoRAError: for settings that this weight cannot have, or a name that is taken or cannot be.
        """
        check_adapter_name(name)
        check_settings(rank, dropout, init, self.weight.shape, lora_alpha=alpha)
        if name in self.adapters:
            raise LoRAError(f"this layer has an adapter named {name!r} already")
        settings = AdapterSettings(int(rank), float(alpha), float(dropout), use_rslora, use_dora)  # of numpy too
        lora_A, lora_B = initial_factors(self.weight, rank, settings.scaling, init)
        self.lora_A[name], self.lora_B[name] = nn.Parameter(lora_A), nn.Parameter(lora_B)
        if init == "pissa":
            self.lora_A_initial[name] = nn.Parameter(lora_A.clone(), requires_grad=False)
            self.lora_B_initial[name] = nn.Parameter(lora_B.clone(), requires_grad=False)
        if use_dora:
            self.lora_magnitude[name] = nn.Parameter(row_norms(self.weight.detach().float()))
        self.adapters[name] = settings

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter and its parameters.

        Raises:
            KeyError: if there is none of that name.
        """
        del self.adapters[name]
        for parameters in self._parameter_dicts():
            self._put(parameters, name, None)

    def _parameter_dicts(self) -> tuple[nn.ParameterDict, ...]:
        return self.lora_A, self.lora_B, self.lora_magnitude, self.lora_A_initial, self.lora_B_initial

    def trained_parameters(self, name: str) -> list[nn.Parameter]:
        """A, B and DoRA's magnitude of one adapter."""
        return [p[name] for p in (self.lora_A, self.lora_B, self.lora_magnitude) if name in p]

    def factors(self, name: str) -> LoRAFactors:
        """What a file must hold of an adapter: its factors; for PiSSA those of the difference, of twice the rank."""
        settings = self.adapters[name]
        lora_A, lora_B, lora_alpha = self.lora_A[name].detach(), self.lora_B[name].detach(), settings.lora_alpha
        if name in self.lora_A_initial:
            lora_A = torch.cat([lora_A, self.lora_A_initial[name].detach()])
            lora_B = torch.cat([lora_B, -self.lora_B_initial[name].detach()], dim=1)
            lora_alpha *= math.sqrt(2) if settings.use_rslora else 2  # the same scaling at twice the rank
        magnitude = self.lora_magnitude[name].detach() if settings.use_dora else None
        return LoRAFactors(lora_A, lora_B, lora_alpha, settings.use_rslora, magnitude)

    @torch.no_grad()
    def set_factors(self, name: str, factors: LoRAFactors) -> None:
        """Put factors of any rank into a new adapter or an existing one, which keeps its dropout, scale and switch.

        Parameters whose shape stays are overwritten in place, so that an optimizer still knows them.

        Raises:
            LoRAError: if the shapes do not fit the weight, or for a name that cannot be; the layer is unchanged then.
        """
        check_adapter_name(name)
        check_factors(factors, self.weight.shape)
        old = self.adapters.get(name, AdapterSettings(factors.rank, factors.lora_alpha))
        given = {"rank": factors.rank, "lora_alpha": factors.lora_alpha, "use_rslora": factors.use_rslora}
        self.adapters[name] = replace(old, **given, use_dora=factors.magnitude is not None)
        values = factors.lora_A, factors.lora_B, factors.magnitude, None, None
        for parameters, value in zip(self._parameter_dicts(), values):
            self._put(parameters, name, value)

    def _put(self, parameters: nn.ParameterDict, name: str, value: Tensor | None) -> None:
        """Overwrite, replace, add or (None) take away one parameter."""
        if name in parameters and value is not None and parameters[name].shape == value.shape:
            parameters[name].copy_(value)
        elif value is not None:
            parameters[name] = nn.Parameter(value.to(self.weight.device, torch.float32, copy=True))
        elif name in parameters:
            del parameters[name]

    def share_adapters(self, other: LoRALayer, names: Sequence[str]) -> None:
        """Take in adapters of another layer: its very parameters and settings."""
        for name in names:
            self.adapters[name] = other.adapters[name]
            for own, parameters in zip(self._parameter_dicts(), other._parameter_dicts()):
                if name in parameters:
                    own[name] = parameters[name]

    def enabled_adapters(self) -> list[str]:
        """The names of the adapters that are switched on."""
        return [name for name, settings in self.adapters.items() if settings.enabled]

    def delta(self, name: str) -> Tensor:
        """The update of one adapter alone, as trained (at scale 1): W's shape, float32."""
        product = joined(self._products(name, self.adapters[name].scaling))
        if self.adapters[name].use_dora:
            weight = self.weight.to(product[0].dtype)
            return dora_weight(weight, weight, *product, self.lora_magnitude[name]) - weight
        return merged_weight(torch.zeros_like(self.weight, dtype=product[0].dtype), *product)

    def effective_weight(self, names: Sequence[str] | None = None) -> Tensor:
        """W' with all adapters, or those named, that are enabled; W's dtype; differentiable in what they train."""
        names = [name for name in self.enabled_adapters() if names is None or name in names]
        if not names:
            return self.weight
        if not any(self.adapters[name].use_dora for name in names):
            return merged_weight(self.weight, *self._product_of(names))
        return self._unrounded_weight(names).to(self.weight.dtype)

    def _unrounded_weight(self, names: Sequence[str]) -> Tensor:
        """W' with these adapters, in their dtype."""
        weight = base = self.weight.to(self.lora_A[names[0]].dtype)
        for name in names:
            settings = self.adapters[name]
            if settings.use_dora:
                product = joined(self._products(name, settings.scaling))
                with_it = dora_weight(weight, base, *product, self.lora_magnitude[name])
                weight = torch.lerp(weight, with_it, settings.scale)
            else:
                weight = merged_weight(weight, *self._product_of([name]))
        return weight

    def _product_of(self, names: Sequence[str]) -> Product:
        """The product that is the sum of the updates of these adapters, none of them DoRA, at their scales."""
        return joined([p for name in names for p in self._products(name, self.adapters[name].strength)])

    def _products(self, name: str, strength: float) -> list[Product]:
        products = [(self.lora_A[name], self.lora_B[name], strength)]
        if name in self.lora_A_initial:
            products.append((self.lora_A_initial[name], self.lora_B_initial[name], -strength))
        return products

    def forward(self, input: Tensor) -> Tensor:
        x, names = input, self.enabled_adapters()
        if not names:
            return self._base_forward(x, self.weight, self.bias)
        if self.keeps_weight and self._holds_updates(names):
            self.kept_weight = self.effective_weight() if self.kept_weight is None else self.kept_weight
            return self._base_forward(x, self.kept_weight, self.bias)
        dropouts = [self.adapters[name].dropout if self.training else 0.0 for name in names]
        if len(set(dropouts)) == 1 and self._is_product(names):
            return self._lora_forward(x, dropouts[0], self._product_of(names))
        weight_with = self.effective_weight if self._holds_updates(names) else self._unrounded_weight
        if self._holds_updates(names) and not any(dropouts):
            return self._base_forward(x, weight_with(names), self.bias)
        result, before = self._base_forward(x, self.weight, self.bias), self.weight
        for i, dropout in enumerate(dropouts, 1):
            if dropouts[i : i + 1] != [dropout]:  # the next adapter drops out other inputs
                weight = weight_with(names[:i])
                update = (weight - before).to(self.weight.dtype)  # rounded apart from W, in which it would be lost
                result, before = result + self._base_forward(F.dropout(x, dropout), update, None), weight
        return result

    def keep_results(self, weight: Tensor | None = None) -> None:
        """Compute with this W' until `drop_results`, or (None) with that of the next call."""
        self.keeps_weight, self.kept_weight = True, weight

    def drop_results(self) -> None:
        self.keeps_weight, self.kept_weight = False, None

    def _is_product(self, names: Sequence[str]) -> bool:
        """Whether the update of x is B (A x), which DoRA's, with its norm, is not.

        PiSSA's is the difference of two products that are much larger, which half precision would lose.
        """
        if any(self.adapters[name].use_dora for name in names):
            return False
        return not any(name in self.lora_A_initial for name in names) or self._holds_updates(names)

    def _holds_updates(self, names: Sequence[str]) -> bool:
        return holds_updates(self.weight, self.lora_A[names[0]])

    @abstractmethod
    def _base_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the base layer computes, with another weight."""

    @abstractmethod
    def _lora_forward(self, x: Tensor, dropout: float, product: Product) -> Tensor:
        """What the base layer computes, with a product added to its weight; dropout acts on the product's input."""


class LoRALinear(LoRALayer, nn.Linear):
    """A linear layer with LoRA, new or (by `wrap`) around an existing one: (*B, in_features) -> (*B, out_features).

    Args:
        in_features, out_features, bias: of the base layer.
        rank: of the first adapter, named "default".
        alpha: lora_alpha; the update is multiplied by alpha / rank.
        dropout: on the input of the low-rank branch, while training.
    """

    base_class = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        rank: int = 4,
        alpha: float = 1.0,
        dropout: float = 0.0,
    ):
        super().__init__(in_features, out_features, bias)
        self._init_adapters()
        self.add_adapter(DEFAULT_ADAPTER, rank, alpha, dropout)

    def _base_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def _lora_forward(self, x: Tensor, dropout: float, product: Product) -> Tensor:
        if dropout:
            return plain_lora_linear(x, F.dropout(x, dropout), self.weight, self.bias, *product)
        return lora_linear(x, self.weight, self.bias, *product)


class _LoRAConv(LoRALayer):
    """Inputs (B, in, *size), or (in, *size) as the base layers take them."""

    def _is_product(self, names: Sequence[str]) -> bool:
        return self.groups == 1 and super()._is_product(names)  # B reaches across groups

    def _base_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)

    def _lora_forward(self, x: Tensor, dropout: float, product: Product) -> Tensor:
        if x.dim() < self.weight.dim():
            return self._lora_forward(x[None], dropout, product)[0]
        padding = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):  # what the convolution itself cannot pad
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode), (0,) * len(self.stride)
        geometry = Geometry(self.stride, padding, self.dilation)
        convolve = getattr(self, "convolve", None)
        if dropout:
            return plain_lora_conv(x, F.dropout(x, dropout), self.weight, self.bias, *product, geometry, convolve)
        return lora_conv(x, self.weight, self.bias, *product, geometry, convolve)


class LoRAConv2d(_LoRAConv, nn.Conv2d):
    """A 2-D convolution with LoRA, made by `wrap`."""

    base_class = nn.Conv2d


class LoRAConv1d(_LoRAConv, nn.Conv1d):
    """A 1-D convolution with LoRA, made by `wrap`."""

    base_class = nn.Conv1d
