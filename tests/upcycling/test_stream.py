"""What the stream keeps in memory."""

from dense import save_dense
from torch.multiprocessing.reductions import StorageWeakRef

from hf_moe.upcycling import Options, make_plan, open_source
from hf_moe.upcycling.stream import produce


def layer_of(name):
    """Number of the layer, None outside of the layers."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None


def test_one_layer_of_the_source_is_in_memory_at_a_time(tmp_path):
    source = open_source(save_dense(tmp_path / "dense"))
    plan = make_plan(source, Options(experts=3))
    memory, seen, read = [], [], source.read

    def watched(name, *rows):
        alive = {layer for layer, storage in memory if not storage.expired()}
        assert alive <= {layer_of(name)}, f"{name} is read while layers {alive} are in memory"
        weight = read(name, *rows)
        memory.append((layer_of(name), StorageWeakRef(weight.untyped_storage())))
        return weight

    source.read = watched
    for produced in produce(source, plan.tensors()):
        seen.append(produced.tensor.name)
        produced.hashes()
        # A finished tensor may be the source's own memory.
        del produced
    assert len(seen) == len(list(plan.tensors()))
    # Every tensor is read once, and 3 experts share what was read.
    assert len(memory) == len(source.headers)
