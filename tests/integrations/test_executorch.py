"""ExecuTorch: XNNPACK takes a network with EMA attention as one piece."""

import pytest
import timm
import torch
from support.networks import shake

from ema_timm.export import ready_to_export

pytest.importorskip("executorch", reason="executorch brings a PyTorch of its own choice")


@pytest.mark.long
def test_xnnpack_takes_the_whole_network(tmp_path):
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    model = shake(timm.create_model("test_resnet_ema", num_classes=4)).eval()
    x = torch.randn(1, 3, 64, 64)
    program = torch.export.export(ready_to_export(model, "delegate"), (x,))
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    nodes = lowered.exported_program().graph_module.graph.nodes
    called = [str(node.target) for node in nodes if node.op == "call_function"]
    assert called == ["executorch_call_delegate", "<built-in function getitem>"]
    file = tmp_path / "model.pte"
    file.write_bytes(lowered.to_executorch().buffer)
    found = Runtime.get().load_program(str(file)).load_method("forward").execute([x])[0]
    torch.testing.assert_close(found, model(x), rtol=1e-3, atol=1e-4)
