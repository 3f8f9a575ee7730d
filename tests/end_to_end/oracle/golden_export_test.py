"""Exports of the golden folders load in transformers without a missing or an unexpected tensor, and give probe's logits."""
import sys
import tempfile
import unittest

import torch

import program
import reference


class GoldenExport(unittest.TestCase):
    def check(self, golden, form, attention, dtype):
        with tempfile.TemporaryDirectory() as tmp:
            source, folder = f"{program.GOLDEN}/{golden}", f"{tmp}/exported"
            program.call("export", "--from", source, "--to", folder, "--format", form, "--dtype", dtype)
            model, info = reference.load(folder)
            self.assertEqual(type(model).__name__, "DeepseekV32ForCausalLM" if form == "v3.2" else "DeepseekV3ForCausalLM")
            for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
                self.assertFalse(info[problem], f"{problem}: {info[problem]}")
            ids = torch.randint(2, 512, (2, 96), generator=torch.Generator().manual_seed(3))
            with torch.no_grad():
                expected = reference.run(model, ids, attention)
            got = program.probe(folder, ids, f"{tmp}/probe", attention=attention, dtype="fp32")
            print(f"{golden} as {dtype}: {program.compare(self, got, expected, 1e-5, only=('logits', 'router', 'indexer'))}")

    def test_v32_fp32(self):
        self.check("hf_v32_tiny", "v3.2", "sparse", "fp32")

    def test_v32_bf16(self):
        self.check("hf_v32_tiny", "v3.2", "sparse", "bf16")

    def test_v31_fp32(self):
        self.check("hf_v31_tiny", "v3.1", "dense", "fp32")

    def test_v31_bf16(self):
        self.check("hf_v31_tiny", "v3.1", "dense", "bf16")


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1] + sys.argv[2:])
