"""The sparse block of transformers on PyTorch's CPU backend, as `benchmarks.moe` asks for it."""

from typing import Any

import torch
import transformers
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from benchmarks.moe_block import Side, arrays, shape_from, summary
from benchmarks.worker import serve


class Block(Side):
    def prepare(self, shape: str, dtype: str, side: str, mesh: str) -> dict[str, Any]:
        """Loads the block; `side` is the implementation of the experts that transformers is told to use."""
        assert not mesh
        sizes = shape_from(shape)
        config = transformers.Qwen2MoeConfig(
            hidden_size=sizes.width,
            num_experts=sizes.experts,
            num_experts_per_tok=sizes.choices,
            moe_intermediate_size=sizes.inner,
            shared_expert_intermediate_size=sizes.shared_inner,
        )
        config._experts_implementation = side
        values = {name: torch.from_numpy(array).to(getattr(torch, dtype)) for name, array in arrays(sizes).items()}
        self.x, self.dout = values["x"].requires_grad_(), values["dout"]
        with torch.device("meta"):
            self.block = Qwen2MoeSparseMoeBlock(config)
        weights = {
            "gate.weight": values["router"],
            "experts.gate_up_proj": torch.cat([values["gate"], values["up"]], dim=1),
            "experts.down_proj": values["down"],
            **{f"shared_expert.{name}_proj.weight": values[f"shared_{name}"] for name in ("gate", "up", "down")},
            "shared_expert_gate.weight": values["shared_expert_gate"][None],
        }
        self.block.load_state_dict(weights, assign=True)
        self.block.requires_grad_(True)
        return {
            "device": "cpu",
            "backend": f"experts {side}, {torch.get_num_threads()} threads",
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }

    def run(self, backward: bool) -> dict[str, Any]:
        if not backward:
            with torch.no_grad():
                return summary(self.block(self.x).float().numpy(), None)
        self.block.zero_grad(set_to_none=True)
        self.x.grad = None
        out = self.block(self.x)
        out.backward(self.dout)
        assert self.x.grad is not None
        return summary(out.detach().float().numpy(), self.x.grad.float().numpy())


if __name__ == "__main__":
    serve(Block, Block.answer)
