"""The files that weights are stored in, read and written without torch.

Its files, from the top down:

    tensor_file.py    a file of flat tensors and nothing else, or shards of them, as StoredTensors
    tied_weights.py   tied tensors in a safetensors file: stored once, all names in the metadata
    shard_index.py    the index of Hugging Face's shards
    pt_writer.py      .pt files of flat tensors, streamed
    stored_tensor.py  a tensor as byte ranges of files
    pt_reader.py      .pt files as trees of references to tensors; no code is run
    unpickler.py      the unpickler that runs no code
    zips.py           zip archives as torch writes them: the directory, headers, CRCs
    safetensors.py    safetensors files: the header checked, the data streamed
    json_tree.py      a nested structure of plain values as typed JSON
    tensor_writer.py  the open file that a writer fills with tensors
    raw_io.py         reads and writes at a position of a file, all of the bytes or an error
    cast.py           floating-point casts with numpy
    dtypes.py         names, sizes and storages of dtypes
    suffixes.py       file suffixes by format
"""
