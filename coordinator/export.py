"""Export: a state of the run as a directory that Hugging Face transformers loads; a whole directory or none."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from transformers import GenerationConfig
from transformers.utils.logging import disable_progress_bar

from coordinator.tokenizer import Tokenizer
from protocol import model
from protocol.errors import Code, Refused

MARKER: Final = "barnraise.json"  # says that we made the directory, and of which files
CONTRIBUTORS_MAX: Final = 200  # named in the card; the rest are counted


@dataclass(frozen=True)
class Contributor:
    name: str
    tokens: int


@dataclass(frozen=True)
class Facts:
    """What the model card says, and the marker for machines."""

    title: str
    run: str
    round: int
    state: str  # digest: anyone who folds the log gets the same
    tokens: int  # trained on, in certified rounds
    corpus_documents: int
    corpus_tokens: int
    heldout_loss: float | None  # nats per token
    contributors: tuple[Contributor, ...]
    license: str  # of the weights; may be empty
    command: str  # that made the export


def export(
    folder: Path,
    *,
    model_config: str,
    parameters: NDArray[np.float32],
    tokenizer: Tokenizer,
    context: int,
    facts: Facts,
) -> None:
    """Write beside the folder and rename. A folder that we exported before is replaced; any other is left alone."""
    _check_ours(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write(made, model_config, parameters, tokenizer, context, facts)
        _replace(folder, made)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _write(
    made: Path,
    model_config: str,
    parameters: NDArray[np.float32],
    tokenizer: Tokenizer,
    context: int,
    facts: Facts,
) -> None:
    _write_model(made, model_config, parameters, tokenizer.end, context)
    (made / "tokenizer.json").write_bytes(tokenizer.json)
    _write_json(made / "tokenizer_config.json", _tokenizer_config(tokenizer, context))
    (made / "README.md").write_text(_card(facts, parameters.size, context), encoding="utf-8")
    names = sorted(path.name for path in made.iterdir())
    _write_json(made / MARKER, {"files": [*names, MARKER], "facts": asdict(facts)})
    made.chmod(0o755)  # mkdtemp's 0700 is for scratch
    for path in made.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _write_model(made: Path, model_config: str, parameters: NDArray[np.float32], end: int, context: int) -> None:
    disable_progress_bar()  # one for each of a single file's shards
    module: Any = model.build(model_config)
    model.load(module, parameters)
    ends = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}  # a document begins where another ended
    for key, value in ends.items():
        setattr(module.config, key, value)
    module.generation_config = GenerationConfig(
        **ends, do_sample=True, temperature=0.8, max_new_tokens=min(200, context // 2)
    )
    module.save_pretrained(made, max_shard_size="1TB")  # tied weights once, by the architecture's own rules


def _tokenizer_config(tokenizer: Tokenizer, context: int) -> Mapping[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "bos_token": tokenizer.end_text,
        "eos_token": tokenizer.end_text,
        "pad_token": tokenizer.end_text,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }


def _card(facts: Facts, parameters: int, context: int) -> str:
    loss = "not measured" if facts.heldout_loss is None else f"{facts.heldout_loss:.4f} nats per token"
    named = "\n".join(f"- {_plain(who.name)}: {who.tokens:,} tokens" for who in facts.contributors[:CONTRIBUTORS_MAX])
    unnamed = len(facts.contributors) - CONTRIBUTORS_MAX
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["barnraise"]}
    if facts.license:
        front["license"] = facts.license
    return f"""---
{chr(10).join(f"{key}: {json.dumps(value)}" for key, value in front.items())}
---

# {_plain(facts.title)}

A language model of {parameters:,} parameters that volunteers trained together over the internet with Barnraise.

| | |
|---|---|
| run | `{_code(facts.run)}` |
| rounds | {facts.round:,} |
| tokens trained on | {facts.tokens:,} |
| corpus | {facts.corpus_documents:,} documents, {facts.corpus_tokens:,} tokens |
| context | {context:,} tokens |
| held-out loss | {loss} |
| state digest | `{_code(facts.state)}` |

## Use it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
inputs = tokenizer("The ", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs)[0]))
```

## Who made it

{named or "Nobody yet: these are the weights that the run began with."}
{f"{chr(10)}and {unnamed:,} more{chr(10)}" if unnamed > 0 else ""}
## How it was made

```
{_code(facts.command)}
```

The weights are what the run's certified log of rounds folds to. Whoever holds the log can repeat it and compare the
state digest.
"""


def _plain(text: str) -> str:
    """One line in which strangers' characters mean nothing to Markdown, HTML or a terminal."""
    return re.sub(r"[\\`*_\[\]<>#|~!&]", lambda found: f"&#{ord(found[0])};", _visible(text))


def _code(text: str) -> str:
    """One line inside backticks, where only a backtick means anything."""
    return _visible(text).replace("`", "'")


def _visible(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)


def _check_ours(folder: Path) -> None:
    """Nobody's files but our own may be replaced."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise Refused(Code.RUN_EXISTS, f"{folder} is not a folder")
    present = {path.name for path in folder.iterdir()}
    try:
        ours = set(json.loads((folder / MARKER).read_bytes())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    if foreign := sorted(present - ours):
        raise Refused(Code.RUN_EXISTS, f"{folder} holds files that are not of an export: {', '.join(foreign[:3])}")


def _replace(folder: Path, made: Path) -> None:
    """A rename puts a directory in the place of an empty one, so an older export steps aside first."""
    aside = None
    if folder.exists() and any(folder.iterdir()):
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
        folder.rename(aside)
    made.rename(folder)
    handle = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
