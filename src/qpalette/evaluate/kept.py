"""A model that reads each window once: what its body made of it lies on disk, for as many comparisons as one likes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qpalette.core.errors import InputError
from qpalette.storage import StreamingSafetensorsWriter, TensorInfo

STATES, LOGITS = "states", "logits"  # what the file of a window may hold


class KeptPredictions:
    """Stands where a transformers model does in `evaluate_models`, and predicts the same, bit for bit.

    A window's last hidden states are kept, and the model's own code makes logits of them again, whatever it does
    besides the head (a cap, a factor): a window takes its tokens times the hidden size. Of a model whose code gives
    other logits then, the logits are kept: tokens times the vocabulary. With `states_only` they are not, and such a
    model reads its windows again.

    model: it is taken over; `release` takes its body out. folder: one file for each window, found by its tokens; whose
    they are is not looked at.
    """

    def __init__(self, model: Any, folder: Path, states_only: bool = False) -> None:
        self.folder, self.device, self.states_only = folder, model.device, states_only
        self._model, self._name = model, model.base_model_prefix
        self._body: nn.Module | None = model._modules.get(self._name)
        self._stand_in = _KeptBody()
        self._replays: bool | None = None if self._body is not None else False  # None: not tried yet
        self._released = False
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def keeps(self) -> bool:
        """Whether a window that was read is not read again."""
        return self._replays is not False or not self.states_only

    def get_input_embeddings(self) -> Any:
        """None after `release`: known windows were checked when they were read."""
        return None if self._released else self._model.get_input_embeddings()

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, **options: Any) -> Any:
        """An output with the logits of `tokens`, int64 [1, length]; `options` are those of the model.

        Raises InputError for a file that cannot be read, and for a new window after `release`.
        """
        file = self._file(tokens)
        if not file.exists():
            logits = self._read(tokens, options, file)
            if not self.keeps:
                return SimpleNamespace(logits=logits)
        try:
            with safe_open(file, "pt") as stored:
                (name,) = stored.keys()
                kept = stored.get_tensor(name).to(self.device)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} cannot be read ({error}): remove it, and run the same command again") from error
        return SimpleNamespace(logits=kept) if name == LOGITS else self._replay(tokens, options, kept)

    def has_read(self, tokens: Tensor) -> bool:
        """Whether what makes the logits of `tokens`, int64 [1, length], is kept."""
        return self._file(tokens).exists()

    def _file(self, tokens: Tensor) -> Path:
        return self.folder / f"{hashlib.sha256(tokens.cpu().numpy().data).hexdigest()[:32]}.safetensors"

    def release(self) -> None:
        """Only known windows from now on: the memory of the model's body is given back."""
        if self._body is not None:
            setattr(self._model, self._name, self._stand_in)
        self._body, self._released = None, True

    def _read(self, tokens: Tensor, options: dict[str, Any], file: Path) -> Tensor:
        """The logits, and a file of what makes them, if the model `keeps`."""
        if self._released:
            raise InputError("the original has not read this window, and its body is gone")
        seen: list[Any] = []
        hook = None if self._body is None else self._body.register_forward_hook(lambda *call: seen.append(call[-1]))
        try:
            logits: Tensor = self._model(tokens, **options).logits
        finally:
            if hook is not None:
                hook.remove()
        states = getattr(seen[-1], "last_hidden_state", None) if seen else None
        if self._replays is None:
            self._replays = states is not None and self._gives(tokens, options, states, logits)
        name, kept = (STATES, states) if self._replays and states is not None else (LOGITS, logits)
        if self.keeps:
            with StreamingSafetensorsWriter(file, [TensorInfo(name, tuple(kept.shape), kept.dtype)]) as writer:
                writer.write(name, kept)
        return logits

    def _gives(self, tokens: Tensor, options: dict[str, Any], states: Tensor, logits: Tensor) -> bool:
        try:
            return torch.equal(self._replay(tokens, options, states).logits, logits)
        except Exception:  # whatever a model's code raises that looks into its body
            return False

    def _replay(self, tokens: Tensor, options: dict[str, Any], states: Tensor) -> Any:
        self._stand_in.states = states
        setattr(self._model, self._name, self._stand_in)
        try:
            return self._model(tokens, **options)
        finally:
            self._stand_in.states = None
            if self._body is not None:
                setattr(self._model, self._name, self._body)


class _KeptBody(nn.Module):
    """Gives what it is told, whatever it is given."""

    states: Tensor | None = None

    def forward(self, *arguments: Any, **options: Any) -> _Output:
        return _Output(self.states)


class _Output:
    """Of a model's body: hidden states; caches, attentions and what else there is are None."""

    def __init__(self, states: Tensor | None) -> None:
        self.last_hidden_state = states

    def __getitem__(self, index: int) -> Tensor | None:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None
