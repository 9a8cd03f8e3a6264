"""ExecuTorch: EMA attention does not break up what XNNPACK takes of a network.

``.ci/run long`` runs this in an environment of its own: executorch chooses its PyTorch.
"""

import pytest
import timm
import torch
from support.networks import shake

from ema_timm.export import ready_to_export

pytest.importorskip("executorch", reason="executorch brings a PyTorch of its own choice")


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # executorch's own
def test_xnnpack_takes_every_layer(tmp_path):
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    x = torch.randn(1, 3, 64, 64)

    def lower(network):
        program = torch.export.export(network, (x,))
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        nodes = lowered.exported_program().graph_module.graph.nodes
        return lowered, [str(node.target) for node in nodes if node.op == "call_function"]

    model, plain = (
        shake(timm.create_model(name, num_classes=4)).eval()
        for name in ("test_resnet_ema", "test_resnet")
    )
    lowered, called = lower(ready_to_export(model, "delegate"))
    assert "executorch_call_delegate" in called
    assert called == lower(plain)[1]  # XNNPACK leaves some of timm's own pooling out
    file = tmp_path / "model.pte"
    file.write_bytes(lowered.to_executorch().buffer)
    found = Runtime.get().load_program(str(file)).load_method("forward").execute([x])[0]
    torch.testing.assert_close(found, model(x), rtol=1e-3, atol=1e-4)
