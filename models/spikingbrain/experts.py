"""Linear layers of many experts, each row through the one that it is sent to.

R  rows    N  experts    K  inputs    O  outputs
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ExpertLinear(nn.Module):
    """``y_r = weight[expert_r] x_r``: a linear layer without bias for each expert, their weights stacked.

    Eager, rows are sorted by expert, and each expert that has any multiplies its own. Compiled, it is written as a product
    with the gathered weights, which needs no sizes that depend on the data; a compiler must see that nothing is gathered.

    Attributes:
        weight: [N, O, K].
    """

    def __init__(self, experts: int, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new weights, each expert's as those of ``nn.Linear`` are."""
        bound = self.weight.shape[2] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x_RK: Tensor, expert_R: Tensor) -> Tensor:
        """x [R, K], expert [R] int64, 0 to N - 1 -> [R, O]. Raises IndexError for an expert that there is not."""
        if torch.compiler.is_compiling() or x_RK.is_meta or not len(x_RK):
            return torch.bmm(self.weight[expert_R], x_RK.unsqueeze(-1)).squeeze(-1)
        order, counts = rows_by_expert(expert_R, len(self.weight))
        groups = zip(torch.split(x_RK[order], counts), self.weight.unbind(), strict=True)
        y_RO = torch.cat([F.linear(rows, weight_OK) for rows, weight_OK in groups if len(rows)])
        return y_RO[order.argsort()]

    def extra_repr(self) -> str:
        experts, outputs, inputs = self.weight.shape
        return f"experts={experts}, {inputs}, {outputs}"


def rows_by_expert(expert_R: Tensor, experts: int) -> tuple[Tensor, list[int]]:
    """Returns the rows, one at least, in the order of their experts, and how many each expert has.

    Raises IndexError for an expert that there is not.
    """
    if not 0 <= int(expert_R.min()) <= int(expert_R.max()) < experts:
        raise IndexError(f"experts {int(expert_R.min())} to {int(expert_R.max())} of {experts}")
    counts: list[int] = torch.bincount(expert_R, minlength=experts).tolist()
    return expert_R.argsort(stable=True), counts
