"""Prints {tag: [[step, value], ...]} of an event folder, as TensorBoard's own reader sees it."""
import json
import sys

from tensorboard.backend.event_processing import event_accumulator

events = event_accumulator.EventAccumulator(sys.argv[1], size_guidance={"scalars": 0, "tensors": 0})
events.Reload()
out = {}
for tag in events.Tags()["scalars"]:
    out[tag] = [[e.step, repr(float(e.value))] for e in events.Scalars(tag)]
for tag in events.Tags()["tensors"]:
    out[tag] = [[e.step, repr(float(e.tensor_proto.float_val[0]))] for e in events.Tensors(tag)]
print(json.dumps(out))
