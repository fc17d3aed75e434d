"""A causal language model as a policy: render a prompt, score completions of it.

P prompts, G draws a prompt, N packed tokens, D hidden width. Scoring takes the same road as drawing: each prompt is
read once, what the layers remember of it is handed to its G completions, and they go on from there. Prompts are
padded on the left and completions on the right, only within a chunk, and positions are given explicitly, so that
models with absolute positions (GPT-2) score the same text alike in any company.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from klimb.data import Draws, Example, chunks, select
from klimb.models.context import in_context
from klimb.models.hub import eos_ids
from klimb.models.logprob import Head, token_log_prob
from klimb.models.recomputed import recomputed
from klimb.models.room import remembering
from klimb.models.sharded import whole
from klimb.models.written_out import is_llama_like, through_layers
from klimb.ranks import ALONE, Ranks

CHUNK_TOKENS = {"cuda": 4096}
"""a GPU would wait for Python with fewer"""
CHUNK_NUMBERS = 1024 * 576
"""elsewhere: the numbers of one state of so many tokens; a small model would wait for Python with fewer, a large one wants the memory"""
FEWEST_TOKENS = 512
"""of a chunk, however wide the model"""
GROUP_TOKENS = 2048
"""the draws of one prompt are an update's smallest unit: up to so many go together even so, rather than being read twice"""


@dataclass(frozen=True)
class CausalPolicy:
    """A causal language model, and which of its adapters speaks.

    Attributes:
        model: a transformers causal language model (LoRA layers may sit inside it), without dropout.
        tokenizer: the one that goes with it.
        activate: opens a context in which the right adapters are on; nothing to do for a plain model.
        trainable: the tensors that training may move; empty for a reference.
        max_chunk_tokens: how many completion tokens go through the model together; left out, what keeps the device busy.
        end: the tokens that end a completion.
        context: what this policy sees before every prompt (`klimb.models.context`), or nothing.
        virtual: [n, D] embeddings before every prompt, or None (`klimb.models.soft_prompt`).
        prefix: [n, L, 2, H, W] keys and values of each layer before every prompt, or None (`klimb.models.prefix`).
        gradient_checkpointing: whether a backward pass runs each layer once more, in place of keeping what it computed.
        ranks: who shares the work of scoring, without gradients, by whole prompts.
        sharded: who holds parts of its layers (`klimb.models.sharded`).
    """

    model: Any
    tokenizer: Any
    activate: Callable[[], AbstractContextManager] = nullcontext
    trainable: tuple[Tensor, ...] = ()
    max_chunk_tokens: int | None = None
    end: tuple[int, ...] = field(default=())
    context: str = ""
    virtual: Tensor | None = None
    prefix: Tensor | None = None
    gradient_checkpointing: bool = False
    ranks: Ranks = ALONE
    sharded: Ranks = ALONE

    def __post_init__(self) -> None:
        object.__setattr__(self, "end", self.end or eos_ids(self.model, self.tokenizer))
        if self.gradient_checkpointing and self.prefix is not None:
            raise ValueError(
                "gradient_checkpointing: got the family prefix, whose keys and values lie in a memory that a layer run twice "
                "would write twice; leave it out, take a smaller max_chunk_tokens, or the family soft_prompt"
            )

    @property
    def chunk_tokens(self) -> int:
        """Completion tokens that go through the model together."""
        fit = CHUNK_NUMBERS // self.model.config.get_text_config().hidden_size
        usual = max(FEWEST_TOKENS, min(fit, GROUP_TOKENS))
        return self.max_chunk_tokens or CHUNK_TOKENS.get(self.device.type, usual)

    @property
    def group_tokens(self) -> int:
        """Completion tokens of one prompt that go through the model together; of more, coefficients are looked for first."""
        return self.max_chunk_tokens or max(GROUP_TOKENS, self.chunk_tokens)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def context_length(self) -> int:
        """Tokens that prompt and completion may have together, beside the virtual ones."""
        whole = getattr(self.model.config.get_text_config(), "max_position_embeddings", 1 << 30)
        return whole - self.num_virtual

    @property
    def num_virtual(self) -> int:
        """Virtual tokens before every prompt."""
        own = self.prefix if self.virtual is None else self.virtual
        return 0 if own is None else len(own)

    def parameters(self) -> Iterable[Tensor]:
        """The trainable tensors."""
        return self.trainable

    def render(self, example: Example) -> list[int]:
        """Token ids of the prompt: chat messages through the model's template, text as it stands.

        Raises:
            ValueError: messages for a tokenizer without a chat template, or a prompt of no tokens.
        """
        prompt = in_context(example.prompt, self.context) if self.context else example.prompt
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
        elif self.tokenizer.chat_template is None:
            raise ValueError(
                "the prompt is a list of chat messages, but the tokenizer has no chat template; give the prompt as "
                "text, or use a model that was made for chat"
            )
        else:
            ids = self.tokenizer.apply_chat_template(
                [dict(m) for m in prompt], add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
        if not ids:
            raise ValueError(f"the prompt {example.prompt!r} has no tokens; expected at least one")
        return list(ids)

    def decode(self, completion: Tensor) -> str:
        """The text of a completion, special tokens removed."""
        return self.tokenizer.decode(completion, skip_special_tokens=True)

    def spell(self, text: str, *, max_tokens: int) -> Tensor:
        """The tokens of a completion that somebody else wrote, as this policy would draw them, its end among them.

        What is longer than `max_tokens` is cut, and then has no end. An end that the text brings along counts once.
        """
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        own = self.tokenizer.eos_token_id
        if not ids or ids[-1] not in self.end:
            ids = [*ids, own if own in self.end else self.end[0]]
        return torch.tensor(ids[:max_tokens], dtype=torch.int64)

    @property
    def head(self) -> Head:
        """The output embedding with whatever the architecture does to its logits."""
        config, output = self.model.config.get_text_config(), self.model.get_output_embeddings()
        scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        return Head(
            output.weight, output.bias, float(scale), getattr(config, "final_logit_softcapping", None)
        )

    def hidden(self, draws: Draws) -> Tensor:
        """[N, D] the last layer's state that predicts each packed token; differentiable in `parameters()`."""
        with self.activate():
            parts = [self._hidden(piece) for piece in chunks(draws, self.chunk_tokens)]
        return torch.cat(parts)

    def log_prob(self, draws: Draws) -> Tensor:
        """[N] log pi(token | prompt, earlier tokens) of each packed token, nats, float32 or wider.

        Not the same as the log-probability under a sampler's temperature or top-p: this is always the policy's own.
        """
        if self.ranks.world > 1:
            return torch.cat([tokens for tokens, _ in self._shared(draws, states=False)])
        return self.log_prob_and_hidden(draws)[0]

    def log_prob_and_hidden(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """`log_prob` [N] on the CPU, and the `hidden` states [N, D] it was taken from, where they are."""
        if self.ranks.world > 1:
            tokens, states = zip(*self._shared(draws, states=True), strict=True)
            return torch.cat(tokens), torch.cat(states)
        if not draws.examples:
            return torch.zeros(0), torch.zeros(0, 0)
        tokens = torch.cat([ids for group in draws.completions for ids in group]).to(self.device)
        hidden = self.hidden(draws)
        return token_log_prob(hidden, self.head, tokens).to("cpu"), hidden

    def _shared(self, draws: Draws, *, states: bool) -> list[tuple[Tensor, Tensor]]:
        """`log_prob_and_hidden` of each rank's share of the prompts, states only if asked for."""

        @torch.no_grad()
        def own() -> tuple[Tensor, Tensor]:
            here = replace(self, ranks=ALONE)
            tokens, hidden = here.log_prob_and_hidden(select(draws, self.ranks.share(draws.num_prompts)))
            return tokens, hidden.cpu() if states else hidden[:0].cpu()

        with whole(self):
            return [part for part in self.ranks.gather(own) if len(part[0])]

    def _hidden(self, draws: Draws) -> Tensor:
        prompts = [self._prompt_ids(example) for example in draws.examples]
        learns = torch.is_grad_enabled()
        if self.sharded.world > 1 and learns:
            return self._hidden_by_rows(draws, prompts)
        if self.prefix is None and is_llama_like(self.model):
            return self._hidden_packed(draws, prompts)
        if self.gradient_checkpointing and learns:
            return self._hidden_by_rows(draws, prompts)
        first, cache, mask = self.read_prompts(draws.examples)
        cache.batch_repeat_interleave(draws.num_draws)
        first, mask = (x.repeat_interleave(draws.num_draws, 0) for x in (first, mask))
        position = mask.sum(1)
        rows = [ids for group in draws.completions for ids in group]
        lengths = draws.lengths.flatten().to(self.device)
        width = max(int(lengths.max()) - 1, 0)  # the last token of a completion predicts nothing
        hidden = first[:, None]
        if width > 0:
            ids = torch.zeros(len(rows), width, dtype=torch.int64)
            for i, row in enumerate(rows):
                ids[i, : len(row[:-1])] = row[:-1]  # not len(row) - 1: a completion may have no tokens at all
            step = torch.arange(width, device=self.device)
            here = step < lengths[:, None] - 1
            later = self.body(
                input_ids=ids.to(self.device),
                attention_mask=torch.cat([mask, here.to(mask.dtype)], 1),
                position_ids=position[:, None] + step,
                **remembering(self.model, cache),
            ).last_hidden_state
            hidden = torch.cat([hidden, later], 1)
        kept = torch.arange(width + 1, device=self.device) < lengths[:, None]
        return hidden[kept]

    def _hidden_by_rows(self, draws: Draws, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The same in one call of the model, the prompt read again in every row: each layer is run once, and keeps no memory."""
        rows = [
            (torch.tensor(prompt), ids)
            for prompt, group in zip(prompts, draws.completions, strict=True)
            for ids in group
        ]
        width = max(len(prompt) + max(len(ids) - 1, 0) for prompt, ids in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        mask = torch.zeros(len(rows), width, dtype=torch.int64)
        predicts = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, (prompt, completion) in enumerate(rows):
            read = torch.cat([prompt, completion[:-1]])
            ids[i, : len(read)], mask[i, : len(read)] = read, 1
            predicts[i, len(prompt) - 1 : len(prompt) - 1 + len(completion)] = True
        # no attention mask: what stands on the right of a row is hidden from it anyway
        with recomputed(self.body, self.activate) if self.gradient_checkpointing else nullcontext():
            states = self.body(
                **self._embedded(ids.to(self.device), mask.to(self.device)),
                position_ids=torch.arange(width, device=self.device).expand(len(rows), -1),
                use_cache=False,
            ).last_hidden_state
        return states[predicts.to(self.device)]

    def _hidden_packed(self, draws: Draws, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The same through Llama's layers written out: prompts and completions packed, each token once."""
        rows = [[ids[:-1] for ids in group] for group in draws.completions]
        ids = torch.cat([torch.tensor(p) for p in prompts] + [r for group in rows for r in group])
        starts, position, predicts = _packed_places([len(p) for p in prompts], draws)
        embedded = self._embedded_packed(ids, starts)
        lengths = [[len(r) for r in group] for group in rows]
        states = through_layers(
            self.model,
            embedded,
            position.to(self.device),
            [len(p) for p in prompts],
            lengths,
            recompute=self.gradient_checkpointing,
        )
        return self.body.norm(states[predicts.to(self.device)])

    def _embedded_packed(self, ids: Tensor, starts: Tensor) -> Tensor:
        """[N] packed tokens -> [N, D] what the layers read, with the virtual tokens where each prompt starts [P]."""
        embedded = self.model.get_input_embeddings()(ids.to(self.device))
        if self.virtual is None:
            return embedded
        place = (starts[:, None] + torch.arange(len(self.virtual))).flatten().to(self.device)
        return embedded.index_copy(0, place, self.virtual.repeat(len(starts), 1).to(embedded.dtype))

    def packed_prompts(self, examples: Sequence[Example]) -> tuple[Tensor, list[int]]:
        """What the layers read of the prompts, packed [N, D], and how many tokens each has [P]; a prefix is not among them."""
        prompts = [self._prompt_ids(example) for example in examples]
        lengths = [len(prompt) for prompt in prompts]
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        return self._embedded_packed(torch.tensor([t for prompt in prompts for t in prompt]), starts), lengths

    @property
    def body(self) -> Any:
        """The model without its head."""
        return self.model.get_decoder()

    def read_prompts(self, examples: Sequence[Example]) -> tuple[Tensor, Any, Tensor]:
        """Read each prompt: last hidden state [P, D], what the layers remember, attention mask [P, L], a prefix among both."""
        from transformers import DynamicCache

        prompts = [self._prompt_ids(example) for example in examples]
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros(len(prompts), longest, dtype=torch.int64)
        for i, prompt in enumerate(prompts):
            ids[i, longest - len(prompt) :] = torch.tensor(prompt)
            mask[i, longest - len(prompt) :] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        cache = DynamicCache(config=self.model.config)
        read, prefixed = self._embedded(ids, mask), 0 if self.prefix is None else len(self.prefix)
        if self.prefix is not None:
            mask = torch.cat([mask.new_ones(len(mask), prefixed), mask], 1)
            for i, (keys, values) in enumerate(self.prefix.permute(1, 2, 3, 0, 4)):
                cache.update(*(x.expand(len(mask), -1, -1, -1) for x in (keys, values)), i)
        out = self.body(
            **read,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, prefixed:],
            **remembering(self.model, cache),
        )
        return out.last_hidden_state[:, -1], cache, mask

    def _prompt_ids(self, example: Example) -> list[int]:
        # virtual tokens stand where their embeddings go; which token it is does not matter
        return [0] * (0 if self.virtual is None else len(self.virtual)) + self.render(example)

    def _embedded(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """What the model reads: token ids, or their embeddings with the virtual tokens where each row begins."""
        if self.virtual is None:
            return {"input_ids": ids}
        place = mask.cumsum(1) - 1
        here = (mask == 1) & (place < len(self.virtual))
        embeddings = self.model.get_input_embeddings()(ids)
        own = self.virtual[place.clamp(0, len(self.virtual) - 1)]
        return {"inputs_embeds": torch.where(here[..., None], own, embeddings)}


def _packed_places(prompts: Sequence[int], draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    """Where each prompt begins [P], each packed token's position [N], and which token predicts each of the completions'.

    Prompts are packed first, then all completions without their last tokens, which predict nothing.
    """
    lengths = torch.tensor(prompts)
    ends = lengths.cumsum(0)
    read = (draws.lengths - 1).clamp(min=0)
    position = [torch.arange(n) for n in prompts]
    predicts, at = [], int(ends[-1])
    for p, group in enumerate(draws.lengths.tolist()):
        for g, length in enumerate(group):
            own = int(read[p, g])
            position.append(prompts[p] + torch.arange(own))
            if length:
                predicts += [ends[p : p + 1] - 1, at + torch.arange(own)]
            at += own
    return (
        ends - lengths,
        torch.cat(position),
        torch.cat(predicts) if predicts else torch.zeros(0, dtype=torch.int64),
    )


@torch.no_grad()
def check_head(policy: CausalPolicy) -> None:
    """Refuse a model that does more to its logits than `policy.head` knows of.

    The model's own logits of a few tokens must be head(hidden state), to a hundredth of their range (in bfloat16 a
    model that caps its logits rounds once more than `Head` does).

    Raises:
        ValueError: they are not; every log-probability would be wrong, silently.
    """
    ids = torch.arange(min(4, policy.model.config.get_text_config().vocab_size), device=policy.device)[None]
    with policy.activate():
        own = policy.model(input_ids=ids, use_cache=False).logits[0].float()
        ours = policy.head.logits(policy.body(input_ids=ids, use_cache=False).last_hidden_state[0]).float()
    difference, extent = (own - ours).abs().max().item(), own.abs().max().item()
    if not difference <= 0.01 * extent:
        raise ValueError(
            f"{type(policy.model).__name__}: its logits are not those of its output embedding (they differ by "
            f"{difference:.2g}, the largest is {extent:.2g}); expected at most a scale and a soft-cap in between, or "
            "the weights are not finite; klimb cannot score this architecture"
        )


@contextmanager
def adapters(model: Any, *, active: str | None) -> Generator[None]:
    """Within this context the peft `model` speaks through its adapter `active`, or through none of them.

    The adapter that was active before is active again afterwards, and what is trainable does not change:
    peft's own `set_adapter` freezes every adapter it turns off.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = active is None
            if active is not None:
                layer._active_adapter = [active]
        yield
    finally:
        for layer, (name, off) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = name, off
