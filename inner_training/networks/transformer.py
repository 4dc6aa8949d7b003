"""Transformers with gates on heads and units: a block, a byte-level language model, and a small vision transformer."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from trimtab.errors import UserError, check_whole, out_of_range
from trimtab.inner_training.networks.seeding import Arrays

EMBEDDING_STD = 0.02  # of GPT-2 (Radford et al., *Language models are unsupervised multitask learners*, 2019)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        check_whole(name, size, low=1)


class TransformerBlock(nn.Module):
    """Attention and an MLP, each behind a layer norm and added to what came in.

    The pre-norm form of Xiong et al., *On layer normalization in the transformer architecture*, arXiv 2002.04745. All
    tokens are rows of one matrix, and attention is two matrix products and a softmax: forms that stack over runs into
    batched products, which fused attention on a CPU does not.

    Gates are float buffers, 1 for active and 0 for inactive: ``gate0`` (heads,) is multiplied onto what each head
    gathers, ``gate1`` (units,) onto the hidden units of the MLP (GELU, in its tanh form).

    Attributes:
        width: numbers per token.
        heads: attention heads.
        units: hidden units of the MLP.
        head_width: numbers per token and head; ``width / heads`` unless given.

    Raises:
        UserError: when a size is below 1, or ``width`` is no multiple of ``heads`` and ``head_width`` is not given.

    >>> TransformerBlock(32, heads=4, units=64)(torch.zeros(5 * 16, 32), tokens=16).shape
    torch.Size([80, 32])
    """

    gate0: Tensor
    gate1: Tensor

    def __init__(self, width: int, heads: int, units: int, head_width: int | None = None) -> None:
        super().__init__()
        _check_sizes(width=width, heads=heads, units=units)
        if head_width is None:
            if width % heads:
                raise UserError(f"width is {width} and heads is {heads}; give a width that is a multiple of the heads")
            head_width = width // heads
        _check_sizes(head_width=head_width)
        self.head_width = head_width
        self.width, self.heads, self.units = width, heads, units
        self.norm0 = nn.LayerNorm(width)
        self.attend = nn.Linear(width, 3 * heads * self.head_width)
        self.project = nn.Linear(heads * self.head_width, width)
        self.norm1 = nn.LayerNorm(width)
        self.up = nn.Linear(width, units)
        self.down = nn.Linear(units, width)
        self.register_buffer("gate0", torch.ones(heads))
        self.register_buffer("gate1", torch.ones(units))

    def forward(self, x: Tensor, tokens: int, causal: bool = False) -> Tensor:
        """Maps the tokens of B sequences, (B * tokens, width), to as many.

        Args:
            x: sequence after sequence.
            tokens: tokens of a sequence.
            causal: whether a token looks at itself and those before it only.
        """
        x = x + self.project(self._gathered(self.norm0(x), tokens, causal))
        return x + self.down(functional.gelu(self.up(self.norm1(x)), approximate="tanh") * self.gate1)

    def _gathered(self, x: Tensor, tokens: int, causal: bool) -> Tensor:
        parts = self.attend(x).view(-1, tokens, 3, self.heads, self.head_width)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, tokens, head_width)
        scores = query @ key.mT / math.sqrt(self.head_width)
        if causal:
            place = torch.arange(tokens, device=x.device)
            scores = scores.masked_fill(place[:, None] < place, -torch.inf)
        gathered = (scores.softmax(-1) @ value) * self.gate0.view(-1, 1, 1)
        return gathered.transpose(1, 2).reshape(-1, self.heads * self.head_width)

    def active(self, heads: int, units: int) -> dict[str, np.ndarray]:
        """Which elements of its parameters a block has whose first heads and units alone are active.

        Returns:
            A bool array by name, of a shape that broadcasts to the parameter's; those not named are all active.
        """
        inner = np.repeat(np.arange(self.heads) < heads, self.head_width)
        three, hidden = np.tile(inner, 3), np.arange(self.units) < units
        return {
            "attend.weight": three[:, None],
            "attend.bias": three,
            "project.weight": inner[None],
            "up.weight": hidden[:, None],
            "up.bias": hidden,
            "down.weight": hidden[None],
        }


def _blocks(width: int, depth: int, heads: int, units: int) -> nn.ModuleList:
    _check_sizes(depth=depth)
    return nn.ModuleList(TransformerBlock(width, heads, units) for _ in range(depth))


class LanguageModel(nn.Module):
    """A decoder-only transformer that predicts the next byte, with learned positions (as GPT-2).

    It scales by its arguments, as the second example shows, and its own initialisation serves at any size.

    Attributes:
        vocabulary: byte values, or any other tokens.
        context: most tokens of a sequence.
        width, depth, heads: numbers per token, blocks, heads of a block.
        units: hidden units of a block's MLP; four times the width unless given.
        tied: whether the output layer is the transposed embedding (Press & Wolf, arXiv 1608.05859).

    Raises:
        UserError: when a size is below 1, or ``width`` is no multiple of ``heads``.

    >>> LanguageModel(context=16)(torch.zeros(5, 12, dtype=torch.int64)).shape
    torch.Size([5, 12, 256])
    >>> with torch.device("meta"):
    ...     large = LanguageModel(context=256, width=320, depth=8, heads=8, tied=True)
    >>> sum(parameter.numel() for parameter in large.parameters())
    10028160
    """

    def __init__(
        self,
        vocabulary: int = 256,
        context: int = 64,
        width: int = 32,
        depth: int = 2,
        heads: int = 2,
        units: int | None = None,
        tied: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(vocabulary=vocabulary, context=context)
        self.vocabulary, self.context, self.tied = vocabulary, context, tied
        self.heads, self.units = heads, 4 * width if units is None else units
        self.embed = nn.Embedding(vocabulary, width)
        self.place = nn.Parameter(torch.empty(context, width))
        self.blocks = _blocks(width, depth, heads, self.units)
        self.norm = nn.LayerNorm(width)
        self.head = None if tied else nn.Linear(width, vocabulary, bias=False)
        for embedding in (self.embed.weight, self.place):
            nn.init.normal_(embedding, std=EMBEDDING_STD)

    def forward(self, x: Tensor) -> Tensor:
        """Maps int64 tokens (B, T), T at most the context, to (B, T, vocabulary), unnormalised log probabilities.

        Raises:
            RangeError: when there are more tokens than the context holds.
        """
        batch, tokens = x.shape
        if tokens > self.context:
            raise out_of_range("the number of tokens", tokens, 1, self.context)
        h = (self.embed(x) + self.place[:tokens]).flatten(0, 1)
        for block in self.blocks:
            h = block(h, tokens, causal=True)
        weight = self.embed.weight if self.head is None else self.head.weight
        return functional.linear(self.norm(h), weight).view(batch, tokens, self.vocabulary)


class VisionTransformer(nn.Module):
    """A transformer on square patches of an image, with learned positions and the mean of the tokens at the end.

    After Dosovitskiy et al., arXiv 2010.11929, with the mean in place of a class token, as in Beyer et al., *Better
    plain ViT baselines for ImageNet-1k*, arXiv 2205.01580.

    Attributes:
        image: channels, height and width of the images.
        patch: pixels along the edge of a patch.
        outputs: number of outputs.
        width, depth, heads: numbers per token, blocks, heads of a block.
        units: hidden units of a block's MLP; four times the width unless given.

    Raises:
        UserError: when a size is below 1, ``width`` is no multiple of ``heads``, or patches do not fill the image.

    >>> VisionTransformer((3, 32, 32), patch=8, outputs=10)(torch.zeros(5, 3, 32, 32)).shape
    torch.Size([5, 10])
    """

    def __init__(
        self,
        image: tuple[int, int, int],
        patch: int,
        outputs: int,
        width: int = 32,
        depth: int = 2,
        heads: int = 2,
        units: int | None = None,
    ) -> None:
        super().__init__()
        channels, high, wide = image
        _check_sizes(channels=channels, patch=patch, outputs=outputs)
        if high < patch or wide < patch or high % patch or wide % patch:
            raise UserError(f"images are {high} x {wide}; give a patch whose edge, now {patch}, divides both")
        self.image, self.patch, self.outputs = image, patch, outputs
        self.tokens = (high // patch) * (wide // patch)
        self.heads, self.units = heads, 4 * width if units is None else units
        self.embed = nn.Linear(channels * patch * patch, width)
        self.place = nn.Parameter(torch.empty(self.tokens, width))
        self.blocks = _blocks(width, depth, heads, self.units)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)
        nn.init.normal_(self.place, std=EMBEDDING_STD)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (B, channels, height, width) to (B, outputs), unnormalised."""
        channels, high, wide = self.image
        edge = self.patch
        patches = x.view(-1, channels, high // edge, edge, wide // edge, edge).permute(0, 2, 4, 1, 3, 5)
        h = self.embed(patches.reshape(-1, channels * edge * edge))
        h = (h.view(-1, self.tokens, h.shape[-1]) + self.place).flatten(0, 1)
        for block in self.blocks:
            h = block(h, self.tokens)
        pooled = self.norm(h).view(-1, self.tokens, h.shape[-1]).mean(1)
        # A few outputs times a batch is far quicker stacked than a batch times a few outputs (see `MLP`).
        return (self.head.weight @ pooled.mT).mT + self.head.bias


def initial_transformer(
    model: LanguageModel | VisionTransformer, rng: np.random.Generator, heads: int, units: int, scale: float
) -> tuple[Arrays, Arrays]:
    """Draws initial parameters and gates of a transformer of which only the first heads and units are active.

    The draw is that of the modules themselves: linear maps uniform in +-1/sqrt(fan_in), where fan_in counts active
    inputs only; embeddings and positions normal with standard deviation 0.02; layer norms 1 and 0. Weights, embeddings
    and positions are multiplied by ``scale``, biases by ``min(scale, 1)``. What touches an inactive head or unit is
    zero and stays zero, so that norms over all parameters are those of a network that really is that narrow.

    Args:
        model: the network; it is read, not changed.
        rng: source of the draw.
        heads: active heads of each block, in [1, its heads].
        units: active hidden units of each block, in [1, its units].
        scale: factor of the weights, > 0.

    Returns:
        Parameters and buffers by name, float32, in the shapes and the order of the network's own.

    Raises:
        RangeError: when the heads or units do not fit the network.

    >>> model = LanguageModel(context=8, heads=4)
    >>> parameters, gates = initial_transformer(model, np.random.default_rng(0), heads=3, units=100, scale=1.0)
    >>> parameters["blocks.1.up.weight"].shape, gates["blocks.1.gate0"].tolist()
    ((128, 32), [1.0, 1.0, 1.0, 0.0])
    """
    active: dict[str, np.ndarray] = {}
    gates: Arrays = {}
    for index, block in enumerate(model.blocks):
        assert isinstance(block, TransformerBlock)
        for name, given, most in (("heads", heads, block.heads), ("units", units, block.units)):
            if not 1 <= given <= most:
                raise out_of_range(name, given, 1, most)
        active |= {f"blocks.{index}.{name}": mask for name, mask in block.active(heads, units).items()}
        gates[f"blocks.{index}.gate0"] = (np.arange(block.heads) < heads).astype(np.float32)
        gates[f"blocks.{index}.gate1"] = (np.arange(block.units) < units).astype(np.float32)
    parameters: Arrays = {}
    for name, parameter in model.named_parameters():
        shape, owner = tuple(parameter.shape), model.get_submodule(name.rpartition(".")[0])
        factor = scale if len(shape) > 1 else min(scale, 1.0)
        if isinstance(owner, nn.LayerNorm):
            drawn = np.full(shape, float(name.endswith("weight")))
        elif isinstance(owner, nn.Linear):
            inputs = active.get(name.removesuffix("bias").removesuffix("weight") + "weight", np.ones((1, 1)))
            fan_in = np.broadcast_to(inputs, owner.weight.shape).any(0).sum()
            drawn = rng.uniform(-1, 1, shape) * (factor / math.sqrt(fan_in)) * active.get(name, 1.0)
        else:
            drawn = rng.standard_normal(shape) * (factor * EMBEDDING_STD)
        parameters[name] = drawn.astype(np.float32)
    return parameters, gates
