"""Tokenizers of model folders, as vLLM loads them: text to token ids, and chat messages to the prompt they become.

==========================================  =========================================================================
``tokenizer.json``                          read here, with the tokenizers library
``tekken.json`` (Mistral)                   through mistral_common, its chat format included
``tokenizer.model``, ``vocab.json`` with    through transformers' AutoTokenizer; code that comes with a model is never
``merges.txt``, ``vocab.txt`` and others    run
==========================================  =========================================================================

mistral_common and transformers come with vLLM; without it only ``tokenizer.json`` can be read, and the error says what
to install. Chat templates (``chat_template.jinja``, or in ``tokenizer_config.json``) are rendered here, sandboxed, in
the environment that transformers gives them.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from harness.errors import PlanError
from harness.untrusted import read_regular

Messages = Sequence[dict[str, str]]

_OTHERS = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model")
_FILES = ("tokenizer.json", "tekken.json", *_OTHERS)


class TextTokenizer(ABC):
    """What the harness needs of a tokenizer."""

    def __init__(self, label: str, size: int, template: ChatTemplate | None = None) -> None:
        self.label = label
        """Folder, file and the SHA-256 of the file: equal labels tokenize equally."""
        self.size = size
        self._template = template

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens around it."""

    @abstractmethod
    def decode(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """Text of each list of ids."""

    @abstractmethod
    def plain_ids(self) -> list[int]:
        """Ids that are neither special nor added, ascending."""

    def parts(self, text: str) -> int | None:
        """Pieces the text is cut into before any of them is looked at; None where that is not known."""
        return None

    def chat_ids(self, messages: Messages) -> list[int] | None:
        """The prompt that a server makes of chat messages; None when the folder has no chat template."""
        return None if self._template is None else self.encode([self._template.render(messages)])[0]


def load_tokenizer(path: Path) -> TextTokenizer:
    """The tokenizer in ``path``: a model folder, or its ``tokenizer.json`` or ``tekken.json``.

    Raises `PlanError` when there is none, it is damaged, or a package is missing that it needs.
    """
    file = path if not path.is_dir() else next((f for name in _FILES if (f := path / name).exists()), None)
    if file is None:
        raise PlanError(f"{path}: no tokenizer in this folder; looked for {', '.join(_FILES)}")
    try:
        raw = read_regular(file, 2**30)
    except OSError as e:
        raise PlanError(f"{file}: cannot read the tokenizer ({e.strerror}); name a tokenizer.json or its folder") from e
    # Of merges apart from their vocabulary too.
    merges = file.with_name("merges.txt") if file.name == "vocab.json" else None
    whole = raw + (merges.read_bytes() if merges is not None and merges.exists() else b"")
    label = f"{file.resolve().parent.name}/{file.name} sha256:{hashlib.sha256(whole).hexdigest()[:16]}"
    if file.name == "tekken.json":
        return _tekken(file, label)
    if file.name in _OTHERS:
        return _with_transformers(file.parent, label)
    template = ChatTemplate.of(file.parent)
    try:
        return _FastTokenizer(Tokenizer.from_buffer(raw), label, template)
    except Exception as e:  # the library raises nothing narrower
        raise PlanError(f"{file}: not a tokenizer.json of the tokenizers library ({e})") from e


def _with_transformers(folder: Path, label: str) -> TextTokenizer:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        from transformers import AutoTokenizer
    except ImportError as e:
        raise _missing(folder, "transformers", e) from e
    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except ImportError as e:
        raise _missing(folder, "a package that transformers wants for it", e) from e
    except Exception as e:  # whatever a damaged file makes the libraries below raise
        said = (str(e).strip().splitlines() or [type(e).__name__])[0][:300]
        raise PlanError(
            f"{folder}: transformers cannot load this tokenizer ({said}); the folder needs its config.json or "
            "tokenizer_config.json too"
        ) from e
    template = ChatTemplate.of(folder)
    backend = getattr(loaded, "backend_tokenizer", None)
    return _FastTokenizer(backend, label, template) if backend is not None else _SlowTokenizer(loaded, label, template)


def _missing(folder: Path, package: str, error: ImportError) -> PlanError:
    return PlanError(
        f"{folder}: this tokenizer needs {package}, which is not installed ({error}): install the harness with its "
        "[cpu] or [gpu] extra, or put a tokenizer.json into the folder"
    )


class _FastTokenizer(TextTokenizer):
    def __init__(self, tokenizer: Tokenizer, label: str, template: ChatTemplate | None = None) -> None:
        # Settings saved with the file would cut or pad every prompt behind our back.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        super().__init__(label, tokenizer.get_vocab_size(), template)
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        texts: list[str] = self._tokenizer.decode_batch([list(ids) for ids in prompts], skip_special_tokens=False)
        return texts

    def plain_ids(self) -> list[int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return sorted(set(self._tokenizer.get_vocab(with_added_tokens=False).values()) - set(added))

    def parts(self, text: str) -> int | None:
        if self._tokenizer.pre_tokenizer is None:
            return None
        normalizer = self._tokenizer.normalizer
        seen = text if normalizer is None else normalizer.normalize_str(text)
        return len(self._tokenizer.pre_tokenizer.pre_tokenize_str(seen))


class _SlowTokenizer(TextTokenizer):
    def __init__(self, tokenizer: Any, label: str, template: ChatTemplate | None = None) -> None:
        super().__init__(label, tokenizer.vocab_size, template)
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]

    def decode(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        keep = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return [self._tokenizer.decode(list(ids), **keep) for ids in prompts]

    def plain_ids(self) -> list[int]:
        special = set(self._tokenizer.all_special_ids) | set(self._tokenizer.added_tokens_decoder)
        return sorted(set(self._tokenizer.get_vocab().values()) - special)


def _tekken(file: Path, label: str) -> TextTokenizer:
    try:
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
    except ImportError as e:
        raise _missing(file.parent, "mistral_common", e) from e
    try:
        return _TekkenTokenizer(MistralTokenizer.from_file(str(file)), label)
    except Exception as e:  # whatever a damaged file makes the library raise
        raise PlanError(f"{file}: mistral_common cannot load this tokenizer ({type(e).__name__}: {e})") from e


class _TekkenTokenizer(TextTokenizer):
    """Mistral's, of mistral_common; the chat format is part of the tokenizer."""

    def __init__(self, tokenizer: Any, label: str) -> None:
        self._whole, self._tokenizer = tokenizer, tokenizer.instruct_tokenizer.tokenizer
        super().__init__(label, self._tokenizer.n_words)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._tokenizer.encode(text, bos=False, eos=False) for text in texts]

    def decode(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        return [self._tokenizer.decode(list(ids)) for ids in prompts]

    def plain_ids(self) -> list[int]:
        return sorted(set(range(self.size)) - set(self._tokenizer.special_ids))

    def chat_ids(self, messages: Messages) -> list[int] | None:
        from mistral_common.protocol.instruct.request import ChatCompletionRequest

        request: Any = ChatCompletionRequest.model_validate({"messages": list(messages)})
        ids: list[int] = self._whole.encode_chat_completion(request).tokens
        return ids


class ChatTemplate:
    """A Jinja chat template with the special tokens it may name."""

    def __init__(self, source: str, special: dict[str, str], where: str) -> None:
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):
            """``{% generation %}`` marks what the model said, for training: here it is only its content."""

            tags = {"generation"}  # noqa: RUF012  # jinja2's own interface

            def parse(self, parser: Any) -> Any:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(raise_exception=_refuse, strftime_now=lambda form: datetime.now().strftime(form))
        self._special, self._where = special, where
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as e:
            raise PlanError(f"{where}: not a chat template ({e})") from e
        self._parts = False
        self._parts = self._reads_parts()

    @classmethod
    def of(cls, folder: Path) -> ChatTemplate | None:
        """The template of a model folder, None when it has none. Raises `PlanError` when it cannot be read."""
        config = _json_of(folder / "tokenizer_config.json")
        file = folder / "chat_template.jinja"
        where, source = folder / "tokenizer_config.json", config.get("chat_template")
        try:
            if file.exists():
                where, source = file, file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise PlanError(f"{file}: cannot read the chat template ({e})") from e
        if isinstance(source, list):
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            source = named.get("default")
        if not isinstance(source, str):
            return None
        named_tokens = _json_of(folder / "special_tokens_map.json") | config
        special = {
            name: str(token.get("content") if isinstance(token, dict) else token)
            for name, token in named_tokens.items()
            if name.endswith("_token") and isinstance(token, str | dict)
        }
        return cls(source, special, str(where))

    def render(self, messages: Messages) -> str:
        """The text a server makes of ``messages``, ready for an answer. Raises `PlanError` when it refuses them."""
        import jinja2

        given: Sequence[object] = messages
        if self._parts:
            given = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
        try:
            return self._template.render(messages=list(given), add_generation_prompt=True, **self._special)
        except (jinja2.TemplateError, TypeError, ValueError) as e:
            raise PlanError(f"{self._where}: the chat template refuses a conversation ({e})") from e

    def _reads_parts(self) -> bool:
        """Whether the template finds a text only as a part in a list, as those of many vision models do: then vLLM
        gives it the text of a message in that form.
        """
        said: Messages = [{"role": "user", "content": "harness"}]
        try:
            lost = "harness" not in self.render(said)
            self._parts = True
            return lost and "harness" in self.render(said)
        except PlanError:
            return False


def _json_of(file: Path) -> dict[str, object]:
    """A JSON object, empty when there is no such file."""
    try:
        value = json.loads(file.read_bytes()) if file.exists() else {}
    except (OSError, ValueError) as e:
        raise PlanError(f"{file}: cannot be read ({e})") from e
    return value if isinstance(value, dict) else {}


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)
