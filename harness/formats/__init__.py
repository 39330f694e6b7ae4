"""File formats of weights, read and written without torch.

tensor_file.py    a file or shards of flat tensors only, as StoredTensors
tied_weights.py   tied tensors in safetensors: stored once, all names in the metadata
shard_index.py    the index of Hugging Face shards
pt_writer.py      .pt files of flat tensors, streamed
subtrees.py       which part of a structure holds the weights
stored_tensor.py  a tensor as byte ranges of files
pt_reader.py      .pt files as trees of tensor references, without running code
legacy_pt.py      .pt files from before torch 1.6
known_values.py   what pickles of Python's and numpy's plain values hold
unpickler.py      an unpickler that runs no code
pickled.py        objects of unknown classes, and the limits of trees
zips.py           zip archives as torch writes them: directory, headers, CRCs
safetensors.py    safetensors files: checked headers, streamed data
json_tree.py      nested structures of plain values as typed JSON
composites.py     times, paths, namespaces, deques: values that one call makes
tensor_writer.py  an open file, to be filled with tensors
raw_io.py         reads and writes at a file position: all bytes, or an error
cast.py           floating-point casts with numpy
dtypes.py         names, sizes and storages of dtypes
file_kinds.py     what a file is, by its first bytes
suffixes.py       file suffixes by format
"""
