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
def commit_step(
    masked: Tensor,
    score: Tensor | None,
    rule: int,
    bound: Tensor | None,
    bound_value: float,
    tokens: Tensor | None,
    candidates: Tensor | None,
    vocab: int,
    seed: Tensor | None,
    seed_value: int,
    position: Tensor | None,
    step: Tensor | None,
    step_value: int,
    commit_mask: Tensor,
    after: Tensor,
    stream: int,
) -> None: ...
def sample_from_hidden_workspace(rows: int, vocab: int) -> int: ...

class SampleFromHidden:
    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        masked: Tensor | None,
        temperature: Tensor | float,
        seed: Tensor | int,
        position: Tensor | None,
        step: Tensor | int,
        statistics_temperature: Tensor | float,
        softcap: float,
        allowed: Tensor | None,
        ids: Tensor,
        statistics: Tensor,
        workspace: Tensor,
    ) -> None: ...
    def head_parts_takes(self) -> bool: ...
    def head_parts(self, stream: int) -> None: ...
    def logit_parts(self, logits: Tensor, first: int, stream: int) -> None: ...
    def finish(self, stream: int) -> None: ...

def weigh(
    logits: Tensor,
    masked: Tensor | None,
    temperature: Tensor | float,
    softcap: float,
    logsumexp: Tensor,
    probabilities: Tensor,
    stream: int,
) -> None: ...
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    round_before_weight: bool,
    out: Tensor,
    stream: int,
) -> None: ...
def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    positions: Tensor | None,
    cache_key: Tensor | None,
    cache_value: Tensor | None,
    cache_positions: Tensor | None,
    normalized: bool,
    eps: float,
    weight_offset: float,
    round_before_weight: bool,
    style: int,
    query_out: Tensor,
    key_out: Tensor | None,
    stream: int,
) -> None: ...

class Attention:
    on_hopper: bool
    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefix_key: Tensor | None,
        prefix_value: Tensor | None,
        prefix_lengths: Tensor | None,
        page_table: Tensor | None,
        mask: Tensor | None,
        key_starts: Tensor | None,
        key_ends: Tensor | None,
        cu_seqlens: Tensor | None,
        cu_seqlens_k: Tensor | None,
        chosen: Tensor | None,
        left: int,
        right: int,
        block: int,
        prefix_window: int,
        offset: int,
        max_length: int,
        scale: float,
        softcap: float,
        out: Tensor,
        logsumexp: Tensor,
    ) -> None: ...
    def workspace(self) -> int: ...
    def run(self, workspace: Tensor, stream: int) -> None: ...
