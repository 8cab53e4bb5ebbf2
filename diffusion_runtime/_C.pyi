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
