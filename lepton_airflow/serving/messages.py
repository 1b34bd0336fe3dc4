"""The messages of the Open Inference Protocol over gRPC, as classes of protobuf.

The specification: https://github.com/kserve/open-inference-protocol, and of ``RepositoryIndex``
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_model_repository.md. The table below is
made into a descriptor when this module is imported, in microseconds, so no generated code has to fit the version of protobuf
that is installed. Only numbers and types travel: messages that the specification nests stand side by side here. They are in
a pool of their own, beside which a client's generated classes may be imported.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_PACKAGE = "inference"

# Of each message its fields: number, type, name. ``*`` marks a repeated field; ``{}`` a map from strings; fields of which
# only one is set are parted by ``|``.
_TABLE = """
ServerLiveRequest
ServerLiveResponse          1 bool live
ServerReadyRequest
ServerReadyResponse         1 bool ready
ModelReadyRequest           1 string name, 2 string version
ModelReadyResponse          1 bool ready
ServerMetadataRequest
ServerMetadataResponse      1 string name, 2 string version, 3 string* extensions
ModelMetadataRequest        1 string name, 2 string version
TensorMetadata              1 string name, 2 string datatype, 3 int64* shape
ModelMetadataResponse       1 string name, 2 string* versions, 3 string platform, 4 TensorMetadata* inputs, 5 TensorMetadata* outputs
RepositoryIndexRequest      1 string repository_name, 2 bool ready
ModelIndex                  1 string name, 2 string version, 3 string state, 4 string reason
RepositoryIndexResponse     1 ModelIndex* models
InferParameter              1 bool bool_param | 2 int64 int64_param | 3 string string_param | 4 double double_param | 5 uint64 uint64_param
InferTensorContents         1 bool* bool_contents, 2 int32* int_contents, 3 int64* int64_contents, 4 uint32* uint_contents, 5 uint64* uint64_contents, 6 float* fp32_contents, 7 double* fp64_contents, 8 bytes* bytes_contents
InferInputTensor            1 string name, 2 string datatype, 3 int64* shape, 4 InferParameter{} parameters, 5 InferTensorContents contents
InferRequestedOutputTensor  1 string name, 2 InferParameter{} parameters
ModelInferRequest           1 string model_name, 2 string model_version, 3 string id, 4 InferParameter{} parameters, 5 InferInputTensor* inputs, 6 InferRequestedOutputTensor* outputs, 7 bytes* raw_input_contents
InferOutputTensor           1 string name, 2 string datatype, 3 int64* shape, 4 InferParameter{} parameters, 5 InferTensorContents contents
ModelInferResponse          1 string model_name, 2 string model_version, 3 string id, 4 InferParameter{} parameters, 5 InferOutputTensor* outputs, 6 bytes* raw_output_contents
"""

_Field = descriptor_pb2.FieldDescriptorProto


def _add_field(message: descriptor_pb2.DescriptorProto, number: str, kind: str, name: str) -> Any:
    many = kind.endswith(("*", "{}"))
    field = message.field.add(name=name, number=int(number), label=3 if many else 1)
    kind = kind.rstrip("*")
    if kind.endswith("{}"):
        entry = message.nested_type.add(name=f"{name.title().replace('_', '')}Entry")
        entry.options.map_entry = True
        _add_field(entry, "1", "string", "key")
        _add_field(entry, "2", kind[:-2], "value")
        kind = f"{message.name}.{entry.name}"
    if kind.islower():
        field.type = _Field.Type.Value(f"TYPE_{kind.upper()}")
    else:
        field.type, field.type_name = _Field.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"
    return field


def _classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="open_inference.proto", package=_PACKAGE, syntax="proto3")
    for line in _TABLE.strip().splitlines():
        name, _, fields = line.partition(" ")
        message = file.message_type.add(name=name)
        if "|" in fields:
            message.oneof_decl.add(name="choice")
        for text in fields.replace("|", ",").split(",") if fields else []:
            field = _add_field(message, *text.split())
            if message.oneof_decl:
                field.oneof_index = 0
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        m.name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{m.name}"))
        for m in file.message_type
    }


CLASSES: dict[str, Any] = _classes()
