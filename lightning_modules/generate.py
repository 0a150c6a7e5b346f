"""The command that lets models go on with a prompt, one beside the other: `qat-generate artifact=... prompt=...`."""

from typing import Any

import torch
from omegaconf import DictConfig
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from lightning_modules.cli import command
from lightning_modules.models import LoadedModel
from lightning_modules.plain_generation import plain_generation
from lightning_modules.side_by_side import SideBySide, check_positions, listed
from qat.errors import InputError


def main() -> None:
    """Entry point of `qat-generate`."""
    command("generate", _run)


def _run(cfg: DictConfig) -> None:
    _check(cfg)
    prompts = listed(cfg.prompt)
    if not prompts:
        raise InputError("There is no prompt: give one, or several as ['...','...'].")
    models, console = SideBySide(cfg), Console()
    texts: dict[str, dict[str, str]] = {prompt: {} for prompt in prompts}
    for loaded in models.all():
        for prompt in prompts:
            with console.status(f"{loaded.name} writes ..."):
                texts[prompt][loaded.name] = continuation(loaded, prompt, cfg)
    for prompt, found in texts.items():
        console.print(Text(prompt, style="bold"))
        panels = [
            Panel(Text(text), title=Text(name), width=_width(console, len(found))) for name, text in found.items()
        ]
        console.print(Columns(panels))


@torch.no_grad()
def continuation(loaded: LoadedModel, prompt: str, cfg: Any) -> str:
    """What the model writes after `prompt`; the same draws for every model and prompt."""
    tokenizer, model = loaded.tokenizer, loaded.model
    torch.manual_seed(cfg.seed)
    device = next(model.parameters()).device
    if cfg.chat and tokenizer.chat_template is None:
        raise InputError(f"{loaded.name} has no chat template: leave out chat=true.")
    if cfg.chat:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
    else:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if not ids.numel():
        raise InputError("The prompt has no tokens: give a text to go on with.")
    check_positions(loaded, ids.shape[1] + cfg.max_new_tokens, "set a smaller max_new_tokens, or a shorter prompt.")
    drawn = {"temperature": cfg.temperature, "top_p": cfg.top_p, "top_k": cfg.top_k} if cfg.temperature else {}
    with plain_generation(model):
        written = model.generate(  # type: ignore[operator]
            ids.to(device),
            attention_mask=torch.ones_like(ids, device=device),
            max_new_tokens=cfg.max_new_tokens,
            do_sample=bool(cfg.temperature),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **drawn,
        )
    text: str = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def _width(console: Console, panels: int) -> int:
    return max(30, (console.width - panels + 1) // panels)


def _check(cfg: DictConfig) -> None:
    """Refuse numbers before a model is loaded."""
    if not isinstance(cfg.max_new_tokens, int) or cfg.max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {cfg.max_new_tokens}; it is a whole number from 1 on.")
    if not isinstance(cfg.temperature, int | float) or cfg.temperature < 0:
        raise InputError(f"temperature is {cfg.temperature}; it is a number from 0 on.")
    if not isinstance(cfg.top_p, int | float) or not 0 < cfg.top_p <= 1:
        raise InputError(f"top_p is {cfg.top_p}; it lies above 0, up to 1.")
    if not isinstance(cfg.top_k, int) or cfg.top_k < 0:
        raise InputError(f"top_k is {cfg.top_k}; it is a whole number from 0 on, where 0 draws among all.")
    if not cfg.temperature and (cfg.top_k or cfg.top_p < 1):
        raise InputError("temperature is 0, so nothing is drawn: set it to 1 for top_p or top_k.")


if __name__ == "__main__":
    main()
