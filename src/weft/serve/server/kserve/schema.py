"""The messages of KServe v2 over gRPC, as far as this server speaks them, and of gRPC's own health service.

Field numbers are those that Triton and KServe publish, so every client of theirs reads and writes these bytes; a test
holds them against tritonclient's. They live in a pool of their own: a process may hold another package's copy too.

    request = MESSAGES["ModelReadyRequest"](name="small")

A field is written `name=number type`; `[type]` is repeated, `{type}` a map from strings, `?type` one of a message's `?`
fields, of which there is one group at most.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

__all__ = ["HEALTH", "MESSAGES", "SERVICE"]

SERVICE = "inference.GRPCInferenceService"
HEALTH = "grpc.health.v1.Health"

ONEOF = "parameter_choice"

INFERENCE = """
ServerLiveRequest:
ServerLiveResponse: live=1 bool
ServerReadyRequest:
ServerReadyResponse: ready=1 bool
ServerMetadataRequest:
ServerMetadataResponse: name=1 string, version=2 string, extensions=3 [string]
ModelReadyRequest: name=1 string, version=2 string
ModelReadyResponse: ready=1 bool
ModelMetadataRequest: name=1 string, version=2 string
ModelMetadataResponse: name=1 string, versions=2 [string], platform=3 string, inputs=4 [.TensorMetadata], \
    outputs=5 [.TensorMetadata]
ModelMetadataResponse.TensorMetadata: name=1 string, datatype=2 string, shape=3 [int64]

InferParameter: bool_param=1 ?bool, int64_param=2 ?int64, string_param=3 ?string, double_param=4 ?double, \
    uint64_param=5 ?uint64
InferTensorContents: bool_contents=1 [bool], int_contents=2 [int32], int64_contents=3 [int64], uint_contents=4 [uint32], \
    uint64_contents=5 [uint64], fp32_contents=6 [float], fp64_contents=7 [double], bytes_contents=8 [bytes]
ModelInferRequest: model_name=1 string, model_version=2 string, id=3 string, parameters=4 {InferParameter}, \
    inputs=5 [.InferInputTensor], outputs=6 [.InferRequestedOutputTensor], raw_input_contents=7 [bytes]
ModelInferRequest.InferInputTensor: name=1 string, datatype=2 string, shape=3 [int64], parameters=4 {InferParameter}, \
    contents=5 InferTensorContents
ModelInferRequest.InferRequestedOutputTensor: name=1 string, parameters=2 {InferParameter}
ModelInferResponse: model_name=1 string, model_version=2 string, id=3 string, parameters=4 {InferParameter}, \
    outputs=5 [.InferOutputTensor], raw_output_contents=6 [bytes]
ModelInferResponse.InferOutputTensor: name=1 string, datatype=2 string, shape=3 [int64], parameters=4 {InferParameter}, \
    contents=5 InferTensorContents
ModelStreamInferResponse: error_message=1 string, infer_response=2 ModelInferResponse

ModelConfigRequest: name=1 string, version=2 string
ModelConfigResponse: config=1 ModelConfig
ModelConfig: name=1 string, platform=2 string, max_batch_size=4 int32, input=5 [ModelInput], output=6 [ModelOutput], \
    backend=17 string, model_transaction_policy=19 ModelTransactionPolicy
ModelInput: name=1 string, data_type=2 DataType, dims=4 [int64], optional=8 bool
ModelOutput: name=1 string, data_type=2 DataType, dims=3 [int64]
ModelTransactionPolicy: decoupled=1 bool

ModelStatisticsRequest: name=1 string, version=2 string
ModelStatisticsResponse: model_stats=1 [ModelStatistics]
ModelStatistics: name=1 string, version=2 string, last_inference=3 uint64, inference_count=4 uint64, \
    execution_count=5 uint64, inference_stats=6 InferStatistics
InferStatistics: success=1 StatisticDuration, fail=2 StatisticDuration, queue=3 StatisticDuration, \
    compute_input=4 StatisticDuration, compute_infer=5 StatisticDuration, compute_output=6 StatisticDuration
StatisticDuration: count=1 uint64, ns=2 uint64

ModelRepositoryParameter: bool_param=1 ?bool, int64_param=2 ?int64, string_param=3 ?string, bytes_param=4 ?bytes
RepositoryIndexRequest: repository_name=1 string, ready=2 bool
RepositoryIndexResponse: models=1 [.ModelIndex]
RepositoryIndexResponse.ModelIndex: name=1 string, version=2 string, state=3 string, reason=4 string
RepositoryModelLoadRequest: repository_name=1 string, model_name=2 string, parameters=3 {ModelRepositoryParameter}
RepositoryModelLoadResponse:
RepositoryModelUnloadRequest: repository_name=1 string, model_name=2 string, parameters=3 {ModelRepositoryParameter}
RepositoryModelUnloadResponse:
"""

DATA_TYPES = (
    "INVALID", "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64",
    "STRING", "BF16",
)  # fmt: skip
"""Of `DataType`, by number."""

HEALTH_CHECK = """
HealthCheckRequest: service=1 string
HealthCheckResponse: status=1 ServingStatus
"""
SERVING = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")

Field = descriptor_pb2.FieldDescriptorProto
LABELS = {False: Field.LABEL_OPTIONAL, True: Field.LABEL_REPEATED}


def make_file(package: str, text: str, enums: dict[str, tuple[str, ...]]) -> descriptor_pb2.FileDescriptorProto:
    """A .proto file of messages in the notation above."""
    file = descriptor_pb2.FileDescriptorProto(name=f"weft/{package}.proto", package=package, syntax="proto3")
    for name, words in enums.items():
        enum = file.enum_type.add(name=name)
        prefix = "TYPE_" if name == "DataType" else ""
        for number, word in enumerate(words):
            enum.value.add(name=prefix + word, number=number)
    made: dict[str, descriptor_pb2.DescriptorProto] = {}
    for line in text.replace("\\\n", " ").splitlines():
        name, _, fields = line.partition(":")
        outer, _, inner = name.partition(".")
        if not name:
            continue
        message = made[name] = made[outer].nested_type.add(name=inner) if inner else file.message_type.add(name=name)
        for field in fields.split(",") if fields else ():
            label, kind = field.split()
            added, _, at = label.partition("=")
            _add_field(message, f".{package}", name, added, int(at), kind, enums)
    return file


def _add_field(
    message: descriptor_pb2.DescriptorProto, package: str, owner: str, name: str, number: int, kind: str, enums: Any,
) -> None:  # fmt: skip
    field = message.field.add(name=name, number=number, label=LABELS[kind[0] in "[{"])
    bare = kind.strip("[]{}?")
    if kind[0] == "?":
        if not message.oneof_decl:
            message.oneof_decl.add(name=ONEOF)
        field.oneof_index = 0
    if kind[0] == "{":
        entry = message.nested_type.add(name="".join(word.title() for word in name.split("_")) + "Entry")
        entry.options.map_entry = True
        entry.field.add(name="key", number=1, label=Field.LABEL_OPTIONAL, type=Field.TYPE_STRING)
        entry.field.add(
            name="value", number=2, label=Field.LABEL_OPTIONAL, type=Field.TYPE_MESSAGE, type_name=f"{package}.{bare}"
        )
        field.type, field.type_name = Field.TYPE_MESSAGE, f"{package}.{owner}.{entry.name}"
    elif bare[0] == ".":
        field.type, field.type_name = Field.TYPE_MESSAGE, f"{package}.{owner}{bare}"
    elif bare[0].isupper():
        field.type = Field.TYPE_ENUM if bare in enums else Field.TYPE_MESSAGE
        field.type_name = f"{package}.{bare}"
    else:
        field.type = Field.Type.Value(f"TYPE_{bare.upper()}")


def _make_messages() -> dict[str, Any]:
    pool = descriptor_pool.DescriptorPool()
    files = (
        make_file("inference", INFERENCE, {"DataType": DATA_TYPES}),
        make_file("grpc.health.v1", HEALTH_CHECK, {"ServingStatus": SERVING}),
    )
    found: dict[str, Any] = {}
    for file in files:
        pool.Add(file)
        for message in file.message_type:
            found[message.name] = message_factory.GetMessageClass(
                pool.FindMessageTypeByName(f"{file.package}.{message.name}")
            )
    return found


MESSAGES = _make_messages()
"""Message classes by name."""
