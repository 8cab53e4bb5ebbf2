from torch import Tensor

def sample_tokens_workspace(rows: int, vocab: int, limited: bool) -> int: ...
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
    workspace: Tensor,
    stream: int,
) -> None: ...
