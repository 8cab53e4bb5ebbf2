from torch import Tensor

def instruction_sets() -> list[str]: ...
def sample_tokens(
    logits: Tensor,
    masked: Tensor | None,
    temperature: Tensor | float,
    seed: Tensor | int,
    position: Tensor | None,
    step: Tensor | int,
    statistics_temperature: Tensor | float,
    softcap: float,
    allowed: Tensor | None,
    top_k: Tensor | int,
    top_p: Tensor | float,
    min_p: Tensor | float,
    restricted: bool,
    ids: Tensor,
    statistics: Tensor,
    instruction_set: str,
) -> None: ...
def head_workspace(rows: int, vocab: int, temperature: Tensor | float) -> int: ...
def read_head_tile(
    logits: Tensor,
    first: int,
    vocab: int,
    temperature: Tensor | float,
    statistics_temperature: Tensor | float,
    softcap: float,
    allowed: Tensor | None,
    workspace: Tensor,
    instruction_set: str,
) -> None: ...
def sample_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: Tensor | float,
    seed: Tensor | int,
    position: Tensor | None,
    step: Tensor | int,
    statistics_temperature: Tensor | float,
    softcap: float,
    allowed: Tensor | None,
    workspace: Tensor,
    ids: Tensor,
    statistics: Tensor,
    instruction_set: str,
) -> None: ...
def weigh(
    logits: Tensor,
    temperature: Tensor | float,
    softcap: float,
    masked: Tensor | None,
    logsumexp: Tensor,
    out: Tensor,
    instruction_set: str,
) -> None: ...
