#!/usr/bin/env python3
"""Turns text into the token file that dsatrain trains on (HDF5).

    tokenize.py --tokenizer byte --out corpus.h5 book.txt.gz notes.txt
    tokenize.py --tokenizer DeepSeek-V3.1/tokenizer.json --out corpus.h5 *.txt

A document is wrapped in BOS ... EOS. Documents are the parts of a file between form feeds or, where there are
none, the whole file; --document-per-file always takes the whole file.

The file:  /tokens uint32 [N], /document_offsets int64 [D+1] (first 0, last N), attributes format, version,
tokenizer_sha256, vocab_size, bos_id, eos_id, source. Byte tokens: ids 0..255 are the bytes, BOS 256, EOS 257.

Needs h5py and numpy, and for a tokenizer.json also tokenizers (pip install h5py numpy tokenizers).
Exit status: 0 done, 2 wrong usage, 3 an input cannot be used (nothing is written).
"""
import argparse
import gzip
import hashlib
import os
import sys


class InputError(Exception):
    pass


def read_text(path):
    """The bytes of a plain or gzipped file."""
    try:
        with open(path, "rb") as f:
            magic = f.read(2)
        with (gzip.open if magic == b"\x1f\x8b" else open)(path, "rb") as f:
            return f.read()
    except (OSError, EOFError) as e:
        raise InputError(f"cannot read {path} ({getattr(e, 'strerror', None) or e}) check the path and the file") from e


def documents(path, whole):
    data = read_text(path)
    parts = [data] if whole else data.split(b"\f")
    parts = [p for p in parts if p.strip()]
    if not parts:
        raise InputError(f"cannot tokenise {path} (it holds no text) leave it out")
    return parts


class ByteTokenizer:
    sha256 = hashlib.sha256(b"byte").hexdigest()
    vocab_size, bos_id, eos_id = 258, 256, 257

    def encode(self, document, path):
        import numpy as np
        return np.frombuffer(document, np.uint8).astype(np.uint32)


class JsonTokenizer:
    """A HuggingFace tokenizer.json; BOS and EOS are found by DeepSeek's names or the usual ones, or given."""
    BOS = ("<｜begin▁of▁sentence｜>", "<s>", "<|begin_of_text|>", "[BOS]")
    EOS = ("<｜end▁of▁sentence｜>", "</s>", "<|end_of_text|>", "<|endoftext|>", "[EOS]")

    def __init__(self, path, bos, eos):
        try:
            from tokenizers import Tokenizer
        except ImportError as e:
            raise InputError(f"cannot load {path} (the Python package tokenizers is missing) "
                             "run: pip install tokenizers, or use --tokenizer byte") from e
        raw = read_text(path)
        self.sha256 = hashlib.sha256(raw).hexdigest()
        try:
            self.tokenizer = Tokenizer.from_str(raw.decode("utf-8"))
        except Exception as e:  # the package raises bare Exception
            raise InputError(f"cannot load {path} ({e}) give a HuggingFace tokenizer.json") from e
        self.vocab_size = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id = self.special("BOS", bos, self.BOS)
        self.eos_id = self.special("EOS", eos, self.EOS)

    def special(self, what, given, names):
        for name in ([given] if given else names):
            token = self.tokenizer.token_to_id(name)
            if token is not None:
                return token
        raise InputError(f"cannot find the {what} token (the vocabulary has none of {', '.join([given] if given else names)}) "
                         f"name it with --{what.lower()}")

    def encode(self, document, path):
        import numpy as np
        try:
            text = document.decode("utf-8")
        except UnicodeDecodeError as e:
            raise InputError(f"cannot tokenise {path} (it is not UTF-8: byte {e.start} of a document) "
                             "convert it, or use --tokenizer byte") from e
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)


def write(out, tokenizer, inputs, whole):
    """The tokens go through a raw file: HDF5's contiguous layout wants the length first, and memory is short."""
    import h5py
    import numpy as np
    temp, raw = f"{out}.tmp-{os.getpid()}", f"{out}.tmp-{os.getpid()}.raw"
    offsets, step = [0], 1 << 24
    try:
        with open(raw, "wb") as f:
            for path in inputs:
                for document in documents(path, whole):
                    ids = np.concatenate([[tokenizer.bos_id], tokenizer.encode(document, path), [tokenizer.eos_id]])
                    ids.astype("<u4").tofile(f)
                    offsets.append(offsets[-1] + len(ids))
        size = offsets[-1]
        with h5py.File(temp, "w", libver=("earliest", "v110")) as f, open(raw, "rb") as tokens:
            data = f.create_dataset("tokens", (size,), dtype="<u4")
            for at in range(0, size, step):
                data[at:at + step] = np.fromfile(tokens, "<u4", step)
            f.create_dataset("document_offsets", data=np.asarray(offsets, np.int64), dtype="<i8")
            f.attrs["format"] = "dsatrain.tokens"
            f.attrs["version"] = np.int64(1)
            f.attrs["tokenizer_sha256"] = tokenizer.sha256
            f.attrs["vocab_size"] = np.int64(tokenizer.vocab_size)
            f.attrs["bos_id"] = np.int64(tokenizer.bos_id)
            f.attrs["eos_id"] = np.int64(tokenizer.eos_id)
            f.attrs["source"] = ", ".join(os.path.basename(path) for path in inputs)[:1000]
        with open(temp, "rb") as f:
            os.fsync(f.fileno())
        os.rename(temp, out)
    except OSError as e:
        raise InputError(f"cannot write {out} ({e.strerror or e}) check the folder and its free space") from e
    finally:
        for path in (temp, raw):
            if os.path.exists(path):
                os.unlink(path)
    return size, len(offsets) - 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="text files, plain or gzipped, in this order")
    parser.add_argument("--tokenizer", required=True, metavar="byte|FILE", help="'byte', or the path of a tokenizer.json")
    parser.add_argument("--out", required=True, metavar="FILE.h5", help="the token file; never overwritten")
    parser.add_argument("--document-per-file", action="store_true", help="form feeds do not end a document")
    parser.add_argument("--bos", help="name of the BOS token, if it is not one of the usual ones")
    parser.add_argument("--eos", help="name of the EOS token, if it is not one of the usual ones")
    args = parser.parse_args()
    try:
        import h5py, numpy  # noqa: F401  refused here, before any work
    except ImportError as e:
        print(f"error: cannot start (the Python package {e.name} is missing) run: pip install h5py numpy", file=sys.stderr)
        return 3
    try:
        if os.path.exists(args.out):
            raise InputError(f"cannot write {args.out} (it exists already) choose another name or remove that file first")
        byte = args.tokenizer == "byte"
        tokenizer = ByteTokenizer() if byte else JsonTokenizer(args.tokenizer, args.bos, args.eos)
        size, count = write(args.out, tokenizer, args.inputs, args.document_per_file)
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 3
    print(f"{args.out}: {size:,} tokens in {count:,} documents, vocabulary {tokenizer.vocab_size:,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
