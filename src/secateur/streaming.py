"""Running a model with the weights of one block in memory.

The real transformers classes do the work: a skeleton of the model stands on the meta device, the
weights of one block are put into it, the block runs, the weights go. Masks, position embeddings
and whatever else the model hands to its blocks are recorded while the model itself calls them, for
every block separately, since a model may mix kinds of attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn

from secateur.anatomy import Anatomy, describe
from secateur.checkpoint import Checkpoint
from secateur.checkpoint.base import first_line
from secateur.errors import SecateurError, SourceError, is_out_of_memory
from secateur.progress import give_back_memory, map_large_tensors
from secateur.recording import Enough, Feeder, Recorder
from secateur.rereading import StoredLayers, is_large
from secateur.skeleton import bind, build_skeleton, drop_weights, fill_buffers, tie

#: Tokens that pass a block in one call. Bounds the FFN's activations to a few tens of MB.
TOKENS_PER_CALL = 4096
#: Tokens whose logits exist at once: a 128k vocabulary in float32 is half a megabyte a token.
TOKENS_PER_HEAD_CALL = 256


class Stream:
    """A model of which one block is in memory at a time.

    Args:
        checkpoint: the opened model.
        device: where blocks run.
        dtype: type in which they run; float32 unless you know why not.

    Raises:
        SourceError: config and tensors disagree.
        FamilyError: the family is not described.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = torch.device(device)
        self.dtype = dtype
        self.model = build_skeleton(checkpoint)
        self.anatomy: Anatomy = describe(self.model)
        self._blocks: nn.ModuleList = self.model.get_submodule(self.anatomy.family.blocks)
        self._prefix = self.anatomy.family.blocks + "."
        self._names = bind(checkpoint, self.model)
        last = self.model.get_output_embeddings()
        # Of a tied head nothing is stored under this name.
        self._head = next((f"{n}." for n, m in self.model.named_modules() if m is last), "none.")
        self._calls: dict[tuple[int, int], list[dict[str, Any]]] = {}
        self._per_call: int | None = None
        self._whole = False
        fill_buffers(self.model, self.device)
        if self.large:
            map_large_tensors()

    @property
    def large(self) -> bool:
        """See :func:`secateur.rereading.is_large`."""
        return is_large(self.anatomy)

    # ---- the parts ---------------------------------------------------------------------------

    def read_block(self, index: int, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """Parameters and persistent buffers of one block by their name inside it."""
        return {
            name: self.checkpoint.read(stored, dtype)
            for name, stored in self._stored_of_block(index).items()
        }

    def _stored_of_block(self, index: int) -> dict[str, str]:
        """Stored names of a block's tensors by their name inside it."""
        prefix = f"{self._prefix}{index}."
        return {
            name.removeprefix(prefix): stored
            for name, stored in self._names.items()
            if name.startswith(prefix)
        }

    def read_outside(
        self, dtype: torch.dtype | None = None, *, head: bool = True
    ) -> dict[str, torch.Tensor]:
        """Everything that is not in a block: embeddings, final norm, head; tied ones once.

        Args:
            head: also a head of its own, which is as large as the embedding.
        """
        return {
            name: self.checkpoint.read(stored, dtype)
            for name, stored in self._names.items()
            if not name.startswith(self._prefix) and (head or not name.startswith(self._head))
        }

    def stored_parameters(self) -> dict[str, torch.Tensor]:
        """Every parameter of the model that a file holds, by name, without values; tied ones once.

        Buffers, such as the indices of a gathering layer, are not among them.
        """
        wanted = dict(self.model.named_parameters())
        return {name: wanted[name] for name in wanted if name in self._names}

    def read_tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The values of one parameter by its name in the model."""
        return self.checkpoint.read(self._names[name], dtype)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """The block with its weights, float as ``dtype``, on ``device``; they go at the end."""
        module = self._blocks[index]
        if self._whole:
            yield module
            return
        self._fill(index, module)
        # Blocks are mostly read in order: the system may fetch the next one while this one works.
        self.checkpoint.prefetch(self._stored_of_block(index + 1).values())
        try:
            yield module
        finally:
            drop_weights(module)
            give_back_memory()

    def _fill(self, index: int, module: nn.Module) -> None:
        state = {k: v.to(self.device) for k, v in self.read_block(index, self.dtype).items()}
        module.load_state_dict(state, strict=True, assign=True)

    def layers_of(self, index: int) -> StoredLayers:
        """Weights of a block's linear layers as it has them, without the block."""

        def read(name: str) -> torch.Tensor:
            stored = self._names[f"{self._prefix}{index}.{name}.weight"]
            return self.checkpoint.read(stored, self.dtype).to(self.device)

        return StoredLayers(self.anatomy.denses, read)

    @contextmanager
    def set_aside(self, index: int, module: nn.Module) -> Iterator[StoredLayers]:
        """A block at hand lets go of its weights, and has them again, as the source has them."""
        drop_weights(module)
        give_back_memory()
        yield self.layers_of(index)
        self._fill(index, module)

    @contextmanager
    def outside(self, rounded: torch.dtype | None = None, *, head: bool = True) -> Iterator[None]:
        """The parts outside the blocks, in memory, after rounding to a type; they go at the end.

        Args:
            head: see :meth:`read_outside`.
        """
        if self._whole and rounded is None:
            yield
            return
        read = self.read_outside(rounded, head=head)
        state = {}
        for name in list(read):
            tensor = read.pop(name)
            floating = tensor.is_floating_point()
            state[name] = tensor.to(self.device, self.dtype) if floating else tensor
        self.model.load_state_dict(state, strict=False, assign=True)
        tie(self.model, state)
        del state
        try:
            yield
        finally:
            for name, child in self.model.named_modules():
                if not name.startswith(self._prefix):
                    drop_weights(child, recurse=False)
            give_back_memory()

    @contextmanager
    def whole(self) -> Iterator[Any]:
        """All parts in memory at once; meanwhile none is read again.

        For what takes the model as it is many times. Parts may be used, not changed; yields the
        transformers model.
        """
        if self._whole:
            yield self.model
            return
        with ExitStack() as parts:
            parts.enter_context(self.outside())
            for index in range(len(self._blocks)):
                parts.enter_context(self.block(index))
            self._whole = True
            try:
                yield self.model
            finally:
                self._whole = False

    # ---- running -----------------------------------------------------------------------------

    @contextmanager
    def _its_own_code(self) -> Iterator[None]:
        """While code of transformers runs, which believes all that a config says.

        Raises:
            SourceError: it failed.
        """
        try:
            yield
        except Exception as error:
            ours = isinstance(error, SecateurError | Enough | OSError)
            if ours or is_out_of_memory(error):
                raise
            raise SourceError(
                f"the model {self.checkpoint.source} does not run with its config "
                f"({type(error).__name__}: {first_line(error)}): fetch config.json again"
            ) from error

    @torch.no_grad()
    def embed(self, tokens: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """What goes into the first block.

        Args:
            tokens: (windows, length) of token ids.
            dtype: round the weights to this type first, as a file of that type would.

        Returns:
            (windows, length, hidden), on ``device``.
        """
        parts = []
        with self.outside(dtype, head=False):
            for batch in tokens.split(self.windows_per_call(tokens.shape[1])):
                calls: list[dict[str, Any]] = []
                recorders = [
                    Recorder(block, calls, last=i == len(self._blocks) - 1)
                    for i, block in enumerate(self._blocks)
                ]
                with self._blocks_replaced(recorders), suppress(Enough), self._its_own_code():
                    self.model(input_ids=batch.to(self.device), use_cache=False)
                self._calls.setdefault((batch.shape[0], batch.shape[1]), calls)
                hidden = recorders[0].hidden
                assert hidden is not None
                parts.append(hidden)
        return torch.cat(parts)

    @torch.no_grad()
    def forward_block(self, index: int, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Pass ``hidden`` (windows, length, hidden) through ``block``, which stands at ``index``.

        :meth:`embed` must have seen windows of this length before, since it is there that the
        arguments of the blocks are recorded.
        """
        return torch.cat([self.call_block(index, block, batch) for batch in self.batches(hidden)])

    def batches(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The windows of each call of a block, (windows, length, hidden)."""
        return hidden.split(self.windows_per_call(hidden.shape[1]))

    def call_block(self, index: int, block: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        """One call of :meth:`forward_block`; gradients flow where they are enabled."""
        kwargs = self._calls[batch.shape[0], batch.shape[1]][index]
        with self._its_own_code():
            out = block(batch, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def forward(
        self, tokens: torch.Tensor, after: Callable[[int], None] | None = None
    ) -> torch.Tensor:
        """Hidden state (windows, length, hidden) behind the last block, one block at a time.

        Args:
            tokens: (windows, length).
            after: called with the number of each block that is done.
        """
        hidden = self.embed(tokens)
        for layer in range(self.anatomy.layers):
            with self.block(layer) as module:
                hidden = self.forward_block(layer, module, hidden)
            if after is not None:
                after(layer)
        return hidden

    def head_pieces(
        self, hidden: torch.Tensor, tokens: torch.Tensor
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Logits (tokens, vocabulary), float32, a piece of a window at a time.

        The parts outside the blocks must be in memory. Yields the window's number, the place of the
        piece in it, and the logits. Norm and head work token by token, so a window may be cut
        anywhere; whole windows of logits would be large. Gradients flow where they are enabled.
        """
        for window in range(len(tokens)):
            for start in range(0, tokens.shape[1], TOKENS_PER_HEAD_CALL):
                end = start + TOKENS_PER_HEAD_CALL
                feeder = Feeder(hidden[window : window + 1, start:end])
                with self._blocks_replaced([feeder]):
                    ids = tokens[window : window + 1, start:end].to(self.device)
                    with self._its_own_code():
                        logits = self.model(input_ids=ids, use_cache=False).logits
                yield window, start, logits[0].float()

    @torch.no_grad()
    def head(
        self,
        hidden: torch.Tensor,
        tokens: torch.Tensor,
        use: Callable[[int, torch.Tensor], None],
        dtype: torch.dtype | None = None,
    ) -> None:
        """Run final norm and head over ``hidden`` and hand the logits on, window by window.

        Args:
            hidden: (windows, length, hidden), behind the last block.
            tokens: (windows, length), only for the shapes that the model wants to see.
            use: called with the window's number and its logits (length, vocabulary), float32.
            dtype: round the weights to this type first, as a file of that type would.
        """
        pieces: list[torch.Tensor] = []
        with self.outside(dtype):
            for window, start, logits in self.head_pieces(hidden, tokens):
                pieces.append(logits)
                if start + len(logits) == tokens.shape[1]:
                    use(window, torch.cat(pieces))
                    pieces.clear()

    def losses(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Next-token negative log likelihood of every token but the first of each window.

        Returns:
            (windows, length - 1), float64, in nats.
        """
        (found,) = self.losses_each([hidden], tokens)
        return found

    @torch.no_grad()
    def losses_each(
        self, hiddens: Iterable[torch.Tensor], tokens: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        """:meth:`losses` of several hidden states, for which norm and head are read once."""
        with self.outside():
            for hidden in hiddens:
                found = torch.zeros(len(tokens), tokens.shape[1] - 1, dtype=torch.float64)
                for window, start, logits in self.head_pieces(hidden, tokens):
                    targets = tokens[window, start + 1 : start + 1 + len(logits)].to(logits.device)
                    loss = nn.functional.cross_entropy(
                        logits[: len(targets)], targets, reduction="none"
                    )
                    found[window, start : start + len(targets)] = loss.double().cpu()
                yield found

    # ---- inside ------------------------------------------------------------------------------

    @contextmanager
    def calls_of(self, windows: int | None) -> Iterator[None]:
        """Let so many windows pass a block in one call; None: as many as fit."""
        self._per_call = windows
        try:
            yield
        finally:
            self._per_call = None

    def windows_per_call(self, length: int) -> int:
        """Windows of ``length`` tokens that pass a block in one call."""
        return self._per_call or max(1, TOKENS_PER_CALL // length)

    @contextmanager
    def _blocks_replaced(self, stand_ins: list[Any]) -> Iterator[None]:
        """Run the model with other modules in the place of its blocks."""
        parent_path, _, leaf = self.anatomy.family.blocks.rpartition(".")
        parent = self.model.get_submodule(parent_path)
        setattr(parent, leaf, nn.ModuleList(stand_ins))
        try:
            yield
        finally:
            setattr(parent, leaf, self._blocks)
