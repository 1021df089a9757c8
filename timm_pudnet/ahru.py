"""The adaptive hyper-recurrent unit (paper III-D1, III-D2): one code for every predicted layer of the target.

Dimension letters: `b` sketches, `m` width of the sketch and of the state, `L` layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AHRU(nn.Module):
    """Walks the layers of the target with shared weights, starting from the sketch (eq. 4, 5).

    `r = sigmoid(W_r [d, a])`, `z = sigmoid(W_z [d, a])`, `d~ = tanh(W_h [r * d, a])`, `d <- (1 - z) * d + z * d~`,
    `a = sigmoid(W_o d)`, and the code of the layer is `(1 - eta) a + eta s`. The paper leaves the first `a` open:
    here it is a learned parameter.

    Args:
        width: `m`.
        num_layers: `L`.
        eta: Share of the sketch in every code.

    Example:
        >>> AHRU(8, 20)(torch.zeros(8)).shape
        torch.Size([20, 8])
    """

    def __init__(self, width: int, num_layers: int, eta: float = 0.5) -> None:
        super().__init__()
        self.num_layers, self.eta = num_layers, eta
        self.gates = nn.Linear(2 * width, 2 * width, bias=False)  # W_r above W_z
        self.candidate = nn.Linear(2 * width, width, bias=False)  # W_h
        self.output = nn.Linear(width, width, bias=False)  # W_o
        self.start = nn.Parameter(torch.zeros(width))  # a_0

    def forward(self, sketch: Tensor, num_layers: int | None = None) -> Tensor:
        """Codes `[L, m]` of a sketch `[m]`, or `[b, L, m]` of sketches `[b, m]`; of the first `num_layers` if given."""
        count = num_layers or self.num_layers
        if sketch.ndim == 1 and not torch.is_grad_enabled():
            return self._walk(sketch, count)
        gates, candidates, outputs = self.gates.weight.t(), self.candidate.weight.t(), self.output.weight.t()
        state, output = sketch, self.start.expand_as(sketch)
        codes = []
        for _ in range(count):
            reset, update = (torch.cat([state, output], -1) @ gates).sigmoid_().chunk(2, -1)
            candidate = (torch.cat([reset * state, output], -1) @ candidates).tanh_()
            state = torch.lerp(state, candidate, update)
            output = (state @ outputs).sigmoid_()
            codes.append(output)
        return torch.lerp(torch.stack(codes, -2), sketch.unsqueeze(-2), self.eta)

    def _walk(self, sketch: Tensor, count: int) -> Tensor:
        """The same with nothing copied: a hundred small layers are a hundred steps of small operations."""
        width = len(sketch)
        # A row a step, [d, a, r * d]: the gates read its first two thirds, the candidate its last two.
        rows = sketch.new_empty(count + 1, 3 * width)
        rows[0, :width], rows[0, width : 2 * width] = sketch, self.start
        candidate_weight = self.candidate.weight.roll(width, 1)  # for [a, r * d]
        gates, candidate = sketch.new_empty(2 * width), sketch.new_empty(width)
        reset, update = gates.chunk(2)
        states, outputs, resets = (part.unbind() for part in rows.chunk(3, 1))
        gate_inputs, candidate_inputs = rows[:, : 2 * width].unbind(), rows[:, width:].unbind()
        for step in range(count):
            torch.mv(self.gates.weight, gate_inputs[step], out=gates).sigmoid_()
            torch.mul(reset, states[step], out=resets[step])
            torch.mv(candidate_weight, candidate_inputs[step], out=candidate).tanh_()
            torch.lerp(states[step], candidate, update, out=states[step + 1])
            torch.mv(self.output.weight, states[step + 1], out=outputs[step + 1]).sigmoid_()
        return torch.lerp(rows[1:, width : 2 * width], sketch, self.eta)
