"""Which tokens of a conversation are whose: the assistant's, the query's, the context's, padding."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

Messages = Sequence[Mapping[str, Any]]

# Private-use characters around every piece of content while its place in the rendered conversation is looked up.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"


@dataclass(frozen=True)
class TokenRoles:
    """A batch of conversations in tokens, with a boolean mask (b, t) for each role; see `from_messages`.

    Attributes
    ----------
    input_ids, attention_mask
        (b, t).
    assistant
        What assistants say.
    query
        What asks about the context.
    context
        Documents or images that are talked about.
    """

    input_ids: Int[Tensor, "b t"]
    attention_mask: Int[Tensor, "b t"]
    assistant: Bool[Tensor, "b t"]
    query: Bool[Tensor, "b t"]
    context: Bool[Tensor, "b t"]

    @property
    def pad(self) -> Bool[Tensor, "b t"]:
        """Where there is only padding."""
        return self.attention_mask == 0

    @property
    def batch(self) -> dict[str, Tensor]:
        """What the model is called with."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    @classmethod
    def from_messages(
        cls,
        tokenizer: Any,
        conversations: Iterable[Messages],
        *,
        query: Literal["user_content", "non_assistant"] = "user_content",
        context_token_ids: Iterable[int] = (),
        max_length: int = 4096,
        padding_side: Literal["left", "right"] = "left",
    ) -> TokenRoles:
        """Conversations through the tokenizer's chat template, roles by character offset, cut at `max_length` tokens.

        A message is {"role", "content"}; content is a text, or a list of {"type": "text" | "context", "text": …} of
        which the "context" parts are context. context_token_ids: tokens that are context wherever they stand (image
        placeholders). query: "user_content" = the other text of user messages; "non_assistant" = every token that is
        neither assistant nor context, with template, system and start tokens (as ScalSelect's code does). Assistant
        tokens are those that the template marks ({% generation %}), else those of the assistants' contents.
        Needs a fast tokenizer with a chat template. Raises ValueError otherwise, and where a template changes the
        contents.
        """
        if query not in ("user_content", "non_assistant"):
            raise ValueError(f"query: 'user_content' or 'non_assistant', got {query!r}")
        if not getattr(tokenizer, "is_fast", False) or not getattr(tokenizer, "chat_template", None):
            raise ValueError("tokenizer: a fast tokenizer with a chat template is needed")
        placeholders = frozenset(context_token_ids)
        rows = [_roles(tokenizer, messages, query, placeholders, max_length) for messages in conversations]
        if not rows:
            raise ValueError("conversations: at least one is needed, got none")
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        length = max(len(row["input_ids"]) for row in rows)

        def padded(name: str, fill: int, dtype: torch.dtype) -> Tensor:
            filled = [[fill] * (length - len(row[name])) for row in rows]
            pairs = [
                (fill, row[name]) if padding_side == "left" else (row[name], fill) for fill, row in zip(filled, rows)
            ]
            return torch.tensor([[*before, *after] for before, after in pairs], dtype=dtype)

        return cls(
            input_ids=padded("input_ids", pad, torch.long),
            attention_mask=padded("present", 0, torch.long),
            assistant=padded("assistant", 0, torch.bool),
            query=padded("query", 0, torch.bool),
            context=padded("context", 0, torch.bool),
        )


@dataclass(frozen=True)
class SegmentTokens:
    """Prompts made of pieces of text with roles, in tokens: which piece each token belongs to.

    Attributes
    ----------
    input_ids, attention_mask
        (b, t).
    segment
        (b, t): number of the piece in its prompt, -1 for padding and special tokens.
    roles
        Of each prompt, the role of each piece.

    Examples
    --------
    `SegmentTokens.from_segments(tokenizer, [[("great film", "text"), (" label:", "prefix"), (" good", "label")]])`;
    then `.mask("label")` is where labels are, and `.last("prefix")` the positions that predict them.
    """

    input_ids: Int[Tensor, "b t"]
    attention_mask: Int[Tensor, "b t"]
    segment: Int[Tensor, "b t"]
    roles: tuple[tuple[str, ...], ...]

    @property
    def batch(self) -> dict[str, Tensor]:
        """What the model is called with."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    @property
    def position_ids(self) -> Int[Tensor, "b t"]:
        """Place of each token in its prompt, 0 for padding.

        Where padding is left, models with absolute positions (GPT-2, BERT) need it as a keyword beside the batch; those
        with rotary ones do not, and RoBERTa and its kin count for themselves.
        """
        return (self.attention_mask.cumsum(1) - 1).clamp_min(0) * self.attention_mask

    def pool(self, states: Shaped[Tensor, "b t d"], role: str) -> Float[Tensor, "n d"]:
        """The mean state of the tokens of each piece of a role: a row a piece, prompt by prompt, float32 or wider.

        Raises ValueError where such a piece has no token, and for states of another batch.
        """
        if states.shape[:2] != self.segment.shape:
            raise ValueError(f"states: shape {tuple(self.segment.shape)} and a width, got {tuple(states.shape)}")
        selected = self.mask(role).to(states.device)
        most = max(len(roles) for roles in self.roles)
        piece = torch.arange(len(self.roles)).unsqueeze(1) * most + self.segment
        wanted = [row * most + i for row, roles in enumerate(self.roles) for i, own in enumerate(roles) if own == role]
        row_of = torch.full((len(self.roles) * most,), -1)
        row_of[wanted] = torch.arange(len(wanted))
        rows = row_of.to(states.device)[piece.to(states.device)[selected]]
        chosen = states[selected].to(torch.promote_types(states.dtype, torch.float32))
        counts = torch.bincount(rows, minlength=len(wanted))
        if not bool(counts.all()):
            prompt, number = divmod(wanted[int((counts == 0).nonzero()[0])], most)
            raise ValueError(f"role: piece {number} ({role!r}) of prompt {prompt} has no token of its own")
        return chosen.new_zeros(len(wanted), states.shape[-1]).index_add_(0, rows, chosen) / counts.unsqueeze(1)

    def mask(self, role: str) -> Bool[Tensor, "b t"]:
        """Where the tokens of a role are. Raises ValueError for a role that no prompt has."""
        if not any(role in roles for roles in self.roles):
            raise ValueError(
                f"role: no piece is {role!r}; there are {', '.join(sorted({r for o in self.roles for r in o}))}"
            )
        found = torch.zeros_like(self.segment, dtype=torch.bool)
        for row, roles in enumerate(self.roles):
            for number, own in enumerate(roles):
                if own == role:
                    found[row] |= self.segment[row] == number
        return found

    def last(self, role: str) -> list[list[int]]:
        """Of each prompt, the position of the last token of each piece of a role, in order.

        Raises ValueError where such a piece has no token.
        """
        self.mask(role)
        found: list[list[int]] = []
        for row, roles in enumerate(self.roles):
            found.append([])
            for number in (place for place, own in enumerate(roles) if own == role):
                positions = torch.nonzero(self.segment[row] == number).flatten().tolist()
                if not positions:
                    raise ValueError(f"role: piece {number} ({role!r}) of prompt {row} has no token of its own")
                found[-1].append(positions[-1])
        return found

    @classmethod
    def from_segments(
        cls,
        tokenizer: Any,
        prompts: Iterable[Sequence[tuple[str, str]]],
        *,
        add_special_tokens: bool = True,
        padding_side: Literal["left", "right"] = "left",
    ) -> SegmentTokens:
        """Join the pieces (text, role) of each prompt, tokenise the whole once, and find each token's piece.

        A token belongs to the piece that has its last character, so that a space before a word goes with the word.
        Needs a fast tokenizer. Raises ValueError otherwise, and for prompts without text.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError("tokenizer: a fast one is needed, which says where its tokens are in the text")
        rows, roles = [], []
        for number, pieces in enumerate(prompts):
            text, ends = "", []
            for piece, _ in pieces:
                text += piece
                ends.append(len(text))
            if not text:
                raise ValueError(f"prompts: prompt {number} has no text")
            encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
            owner = [bisect_right(ends, end - 1) if end > start else -1 for start, end in encoded["offset_mapping"]]
            rows.append((list(encoded["input_ids"]), [1] * len(owner), owner))
            roles.append(tuple(role for _, role in pieces))
        if not rows:
            raise ValueError("prompts: at least one is needed")
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        length = max(len(ids) for ids, _, _ in rows)

        def padded(place: int, fill: int) -> Tensor:
            fills = [[fill] * (length - len(row[place])) for row in rows]
            left = padding_side == "left"
            return torch.tensor([[*f, *row[place]] if left else [*row[place], *f] for f, row in zip(fills, rows)])

        return cls(padded(0, pad), padded(1, 0), padded(2, -1), tuple(roles))


def predicting_states(
    states: Shaped[Tensor, "b t d"], mask: Shaped[Tensor, "b t"]
) -> tuple[Shaped[Tensor, "b t d"], Bool[Tensor, "b t"]]:
    """Of each token the state that predicts it, which stands one position before; and for which tokens there is one.

    Parameters
    ----------
    states
        Hidden states (b, t, d) of a causal model.
    mask
        (b, t): nonzero = token. Padding may be left or right.

    Returns
    -------
    (states, valid)
        (b, t, d), zero where `valid` (b, t) is false: padding, and the first token of each sequence.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import predicting_states
    >>> found, valid = predicting_states(torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[0, 1, 1]]))
    >>> found[0, :, 0].tolist(), valid[0].tolist()
    ([0.0, 0.0, 2.0], [False, False, True])
    """
    present = mask != 0
    valid = torch.zeros_like(present)
    valid[:, 1:] = present[:, 1:] & present[:, :-1]
    before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], 1)
    return torch.where(valid.unsqueeze(-1), before, torch.zeros_like(before)), valid


def _roles(
    tokenizer: Any, messages: Messages, query: str, placeholders: frozenset[int], max_length: int
) -> dict[str, list[int]]:
    """Token ids and 0/1 roles of one conversation."""
    plain, text, spans = _rendered(tokenizer, messages)
    limits = {"truncation": True, "max_length": max_length}
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, **limits)
    ids = list(encoded["input_ids"])
    roles = _roles_of_tokens(encoded["offset_mapping"], spans)
    assistant = _marked_by_template(tokenizer, plain, ids, limits) or [int(role == "assistant") for role in roles]
    about = [role == "context" or token in placeholders for role, token in zip(roles, ids)]
    context = [int(inside and not spoken) for inside, spoken in zip(about, assistant)]
    free = [not (spoken or inside) for spoken, inside in zip(assistant, context)]
    asked = [int(other and (query == "non_assistant" or role == "user")) for other, role in zip(free, roles)]
    return {"input_ids": ids, "present": [1] * len(ids), "assistant": assistant, "query": asked, "context": context}


def _rendered(tokenizer: Any, messages: Messages) -> tuple[list[dict[str, Any]], str, list[tuple[int, int, str]]]:
    """(messages with plain contents, the conversation as the template renders it, [(start, end, role)] in characters).

    Found by rendering once more with marks around the contents; contents are stripped where the template does so.
    """
    given = _parts(messages)
    for parts in (given, [(index, role, text.strip()) for index, role, text in given]):
        plain = [{**message, "content": _joined(parts, index, "", "")} for index, message in enumerate(messages)]
        marked = [
            {**message, "content": _joined(parts, index, _OPEN, _CLOSE)} for index, message in enumerate(messages)
        ]
        text = tokenizer.apply_chat_template(plain, tokenize=False)
        with_marks = tokenizer.apply_chat_template(marked, tokenize=False)
        pieces = list(re.finditer(f"{_OPEN}([^{_CLOSE}]*){_CLOSE}", with_marks))
        unchanged = with_marks.replace(_OPEN, "").replace(_CLOSE, "") == text
        if unchanged and [piece.group(1) for piece in pieces] == [content for _, _, content in parts]:
            starts = [piece.start() - 2 * number for number, piece in enumerate(pieces)]
            return plain, text, [(start, start + len(part[2]), part[1]) for start, part in zip(starts, parts)]
    raise ValueError("tokenizer: its chat template changes or leaves out contents, so their place cannot be told")


def _parts(messages: Messages) -> list[tuple[int, str, str]]:
    """(message, role, text) of every part."""
    found = []
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            raise ValueError(f"conversations: message {index} has no role")
        pieces = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(pieces, list | tuple) or not pieces:
            raise ValueError(
                f"conversations: message {index} needs a text or a list of parts as content, got {content!r}"
            )
        for piece in pieces:
            kind, text = piece.get("type"), piece.get("text")
            if kind not in ("text", "context") or not isinstance(text, str):
                raise ValueError(f"conversations: message {index} has a part that is no text or context: {piece!r}")
            if _OPEN in text or _CLOSE in text:
                raise ValueError(
                    f"conversations: message {index} holds a reserved private-use character (U+E0F0, U+E0F1)"
                )
            found.append((index, "context" if kind == "context" else role, text))
    return found


def _joined(parts: list[tuple[int, str, str]], index: int, before: str, after: str) -> str:
    return "\n".join(f"{before}{text}{after}" for owner, _, text in parts if owner == index)


def _roles_of_tokens(offsets: Sequence[tuple[int, int]], spans: list[tuple[int, int, str]]) -> list[str]:
    """The role of each token: that of the first span which it overlaps, "" for none."""
    roles, current = [], 0
    for start, end in offsets:
        while current < len(spans) and spans[current][1] <= start:
            current += 1
        overlaps = start < end and current < len(spans) and spans[current][0] < end
        roles.append(spans[current][2] if overlaps else "")
    return roles


def _marked_by_template(
    tokenizer: Any, messages: Messages, ids: list[int], limits: Mapping[str, Any]
) -> list[int] | None:
    """The assistant mask where the template provides one."""
    template = tokenizer.chat_template
    if not isinstance(template, str) or not re.search(r"\{%-?\s*generation\s*-?%\}", template):
        return None
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **limits
    )
    return list(encoded["assistant_masks"]) if list(encoded["input_ids"]) == ids else None
