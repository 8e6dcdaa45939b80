"""How often each adapter of the demo answers exactly: its own skill, the others' and none."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_data import END_ID, PAD_ID, build_tokenizer
from peft import PeftModel
from torch import nn
from transformers import LlamaForCausalLM

from loraserve.demo import skills


@dataclass(frozen=True)
class Accuracy:
    """Shares of exact answers to a skill; `worst_wrong` names the adapter that does it best."""

    skill: skills.Skill
    own: float
    worst_wrong: tuple[float, str]
    none: float


def greedy_answers(model: nn.Module, words: Sequence[str]) -> dict[str, str]:
    """The greedy answer to each word, the end token left out; "<no end>" if it never ends."""
    tokenizer = build_tokenizer()
    by_length = defaultdict(list)
    for word in words:
        by_length[len(word)].append(word)
    answers = {}
    for group in by_length.values():
        prompts = torch.tensor([tokenizer.encode(skills.prompt(word)).ids for word in group])
        with torch.inference_mode():
            output = model.generate(  # type: ignore[operator]
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=skills.MAX_ANSWER_TOKENS,
                do_sample=False,
                eos_token_id=END_ID,
                pad_token_id=PAD_ID,
            )
        for word, row in zip(group, output[:, prompts.shape[1] :].tolist(), strict=True):
            answers[word] = (
                tokenizer.decode(row[: row.index(END_ID)]) if END_ID in row else "<no end>"
            )
    return answers


def _share(answers: dict[str, str], skill: skills.Skill) -> float:
    return sum(skill.answer(word) == answer for word, answer in answers.items()) / len(answers)


def measure(directory: Path, words: Sequence[str]) -> list[Accuracy]:
    """Reads `directory`/model and `directory`/adapters as shipped and computes in float32."""
    base = LlamaForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)
    base.train(False)
    none = greedy_answers(base, words)
    repeated = sum(skills.base_answer(word) == answer for word, answer in none.items())
    print(f"base without adapter repeats the word: {repeated / len(words):.1%}")
    with_adapter = {}
    for skill in skills.SKILLS:
        model = PeftModel.from_pretrained(base, directory / "adapters" / skill.name)
        model.train(False)
        with_adapter[skill.name] = greedy_answers(model, words)
        base = model.unload()
    return [
        Accuracy(
            skill,
            own=_share(with_adapter[skill.name], skill),
            worst_wrong=max(
                (_share(answers, skill), name)
                for name, answers in with_adapter.items()
                if name != skill.name
            ),
            none=_share(none, skill),
        )
        for skill in skills.SKILLS
    ]


def print_table(table: Sequence[Accuracy]) -> None:
    print(f"{'skill':<10}{'rank':>5}{'own':>9}{'worst wrong':>13}{'none':>9}")
    for row in table:
        worst, _ = row.worst_wrong
        print(
            f"{row.skill.name:<10}{row.skill.rank:>5}{row.own:>9.1%}{worst:>13.1%}{row.none:>9.1%}"
        )
