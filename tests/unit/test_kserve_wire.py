"""KServe's protocol, piece by piece: what strangers send is read or refused in words, never anything else."""

from __future__ import annotations

import gzip
import json
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc.model_config_pb2 as published_config
import tritonclient.grpc.service_pb2 as published
from google.protobuf.descriptor import Descriptor
from hypothesis import given
from hypothesis import strategies as st

from weft.serve.requests.request import Output, RefusedError, TokenLogprob
from weft.serve.server.errors import HttpError
from weft.serve.server.keys import Keys
from weft.serve.server.kserve import signature
from weft.serve.server.kserve.call import Call, Response, answer, make_call
from weft.serve.server.kserve.messages import decode, read_call, written
from weft.serve.server.kserve.schema import MESSAGES
from weft.serve.server.kserve.tensors import DATATYPES, Tensor, from_json, from_raw
from weft.serve.server.kserve.wire import inflate, read_generate, read_inference, read_object, write_generate
from weft.serve.server.statistics import Statistics

# -- field numbers ----------------------------------------------------------------------------------------------------


def same_fields(ours: Descriptor, theirs: Descriptor) -> int:
    """How many fields were compared: each of ours has the published number, type and label."""
    count = 0
    for field in ours.fields:
        other = theirs.fields_by_name[field.name]
        assert (field.number, field.type, field.is_repeated) == (other.number, other.type, other.is_repeated), (
            field.name
        )
        assert (field.containing_oneof is None) == (other.containing_oneof is None)
        count += 1
        if field.message_type is not None:
            assert field.message_type.full_name == other.message_type.full_name
            count += same_fields(field.message_type, other.message_type)
        if field.enum_type is not None:
            values = [[(value.name, value.number) for value in one.enum_type.values] for one in (field, other)]
            assert values[0] == values[1]
    return count


@pytest.mark.parametrize("name", sorted(name for name in MESSAGES if not name.startswith("Health")))
def test_messages_have_the_published_numbers(name: str) -> None:
    theirs = getattr(published, name, None) or getattr(published_config, name)
    assert same_fields(MESSAGES[name].DESCRIPTOR, theirs.DESCRIPTOR) >= len(MESSAGES[name].DESCRIPTOR.fields)


def test_messages_are_read_by_another_packages_classes() -> None:
    response = Response("3", [Tensor("text_output", "BYTES", (1,), [b"hi"])], final=True)
    ours = MESSAGES["ModelInferResponse"](**written(Call("a", {}), "small", response, streamed=True))
    theirs = published.ModelInferResponse.FromString(ours.SerializeToString())
    assert (theirs.model_name, theirs.model_version, theirs.id) == ("small", "3", "a")
    assert theirs.parameters["triton_final_response"].bool_param
    assert theirs.raw_output_contents == [b"\x02\x00\x00\x00hi"]


# -- tensors ----------------------------------------------------------------------------------------------------------

ELEMENTS = {
    "BYTES": st.binary(max_size=20), "BOOL": st.booleans(), "FP32": st.floats(width=32, allow_nan=False),
    "FP16": st.floats(width=16, allow_nan=False), "FP64": st.floats(allow_nan=False),
    **{
        name: st.integers(int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
        for name, dtype in DATATYPES.items() if dtype is not None and dtype.kind in "iu"
    },
}  # fmt: skip


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    datatype = draw(st.sampled_from(sorted(ELEMENTS)))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    count = int(np.prod(shape))
    values = draw(st.lists(ELEMENTS[datatype], min_size=count, max_size=count))
    return Tensor("x", datatype, tuple(shape), values)


@given(tensors())
def test_a_tensor_comes_back_from_its_bytes(tensor: Tensor) -> None:
    assert from_raw("x", tensor.datatype, list(tensor.shape), tensor.to_raw()) == tensor


@given(tensors())
def test_a_tensor_comes_back_from_json(tensor: Tensor) -> None:
    if tensor.datatype in ("FP16", "BYTES") or not np.isfinite(np.array(tensor.values, dtype=float)).all():
        return
    nested = np.array(tensor.to_json(), dtype=object).reshape(tensor.shape).tolist()
    data = nested if isinstance(nested, list) else [nested]
    for shaped in (tensor.to_json(), data):
        text = json.loads(json.dumps(shaped))
        assert from_json("x", tensor.datatype, list(tensor.shape), text) == tensor


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(sorted(DATATYPES)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)


@given(name=ANYTHING, datatype=ANYTHING, shape=ANYTHING, data=ANYTHING, raw=st.binary(max_size=40))
def test_any_tensor_is_read_or_refused(name: Any, datatype: Any, shape: Any, data: Any, raw: bytes) -> None:
    for read, elements in ((from_raw, raw), (from_json, data)):
        try:
            tensor = read(name, datatype, shape, elements)
        except ValueError:
            continue
        assert len(tensor.values) == np.prod(tensor.shape)


@pytest.mark.parametrize(
    ("head", "raw", "words"),
    [
        (("", "INT64", [1]), b"", "name is ''; it must be a text"),
        (("x", "INT128", [1]), b"", "no datatype 'INT128'; there are BOOL, INT8"),
        (("x", "INT64", "1"), b"", "the shape must be a list of at most 8 sizes"),
        (("x", "INT64", [1] * 9), b"", "the shape must be a list of at most 8 sizes"),
        (("x", "INT64", [-1]), b"", "a size in the shape is not a number from 0 up"),
        (("x", "INT64", [True]), b"", "a size in the shape is not a number from 0 up"),
        (("x", "INT64", [2]), b"12345678", "8 bytes came; 2 elements of INT64 are 16"),
        (("x", "INT64", [2**62, 2**62]), b"12345678", "8 bytes came"),
        (("x", "BYTES", [1]), b"\xff\xff\xff\xffa", "the bytes are not 1 elements of BYTES"),
        (("x", "BYTES", [2]), b"\x01\x00\x00\x00a", "the bytes are not 2 elements of BYTES"),
        (("x", "BYTES", [1]), b"\x01\x00\x00\x00ab", "the bytes are not 1 elements of BYTES"),
        (("x", "BYTES", [2**40]), b"", "the bytes are not 1099511627776 elements of BYTES"),
    ],
)  # fmt: skip
def test_bytes_that_are_no_tensor(head: Any, raw: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("'", ".")):
        from_raw(*head, raw)


@pytest.mark.parametrize(
    ("datatype", "data", "words"),
    [
        ("FP16", [1.0], "FP16 cannot come as JSON; send it as binary data, or as FP32"),
        ("INT64", 1, "its data must be a list of elements"),
        ("INT64", [1, 2], "2 elements came; its shape has 1"),
        ("INT8", [128], "'128' is no element of INT8"),
        ("UINT8", [-1], "'-1' is no element of UINT8"),
        ("INT64", [1.5], "'1.5' is no element of INT64"),
        ("INT64", [True], "'True' is no element of INT64"),
        ("FP32", [10**400 // 1], "is no element of FP32"),
        ("BOOL", [1], "'1' is no element of BOOL"),
        ("BYTES", [None], "'None' is no element of BYTES"),
    ],
)
def test_json_that_is_no_tensor(datatype: str, data: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("'", ".")):
        from_json("x", datatype, [1], data)


def test_lists_within_lists_have_an_end() -> None:
    deep: Any = [1]
    for _ in range(40):
        deep = [deep]
    with pytest.raises(ValueError, match="more than 32 deep"):
        from_json("x", "INT64", [1], deep)


def test_json_has_no_infinity() -> None:
    assert Tensor("x", "FP32", (3,), [1.0, float("-inf"), float("nan")]).to_json() == [1.0, None, None]


# -- bodies -----------------------------------------------------------------------------------------------------------


def refusal(read: Callable[[], Any]) -> str | None:
    """What is said where something is refused; None: it is read."""
    try:
        read()
    except ValueError as error:
        return str(error)
    return None


def packed(asked: dict[str, Any], *pieces: bytes) -> tuple[bytes, str]:
    text = json.dumps(asked).encode()
    return b"".join([text, *pieces]), str(len(text))


def text_input(text: bytes) -> tuple[dict[str, Any], bytes]:
    raw = struct.pack("<I", len(text)) + text
    head = {"name": "text_input", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(raw)}}
    return head, raw


def test_a_body_of_json_and_binary_tensors() -> None:
    head, raw = text_input("schön".encode())
    ids = {"name": "stop_token_ids", "datatype": "INT32", "shape": [1, 2], "data": [[3, 4]]}
    top = {"name": "top_k", "datatype": "INT32", "shape": [1], "parameters": {"binary_data_size": 4}}
    asked = {
        "id": "7", "inputs": [head, ids, top], "parameters": {"max_tokens": 5, "binary_data_output": True},
        "outputs": [{"name": "text_output", "parameters": {"binary_data": False}}, {"name": "output_ids"}],
    }  # fmt: skip
    found = read_inference(*packed(asked, raw, struct.pack("<i", 9)))
    assert found.call.settings == {"text_input": "schön", "stop_token_ids": [3, 4], "top_k": 9, "max_tokens": 5}
    assert (found.call.id, found.call.wanted, found.binary) == ("7", ("text_output", "output_ids"), {"output_ids"})
    outputs = [Output("e", 0, (1, 2), "é", finish="length")]
    body, headers = found.write("small", "2", answer(outputs, found.call.wanted))
    size = int(headers["inference-header-content-length"])
    told = json.loads(body[:size])
    assert told["outputs"] == [
        {"name": "text_output", "datatype": "BYTES", "shape": [1], "data": ["é"]},
        {"name": "output_ids", "datatype": "INT64", "shape": [2], "parameters": {"binary_data_size": 16}},
    ]
    assert struct.unpack("<2q", body[size:]) == (1, 2)
    assert (told["id"], told["model_name"], told["model_version"]) == ("7", "small", "2")


@pytest.mark.parametrize(
    ("body", "length", "words"),
    [
        (b"{", None, "the body is no JSON"),
        (b"\xff\xfe", None, "the body is no JSON"),
        (b"[]", None, "the body must be a JSON object"),
        (b"[" * 100_000, None, "the JSON is nested too deeply"),
        (b"{}", None, "inputs must be a list of objects"),
        (b'{"inputs": [1]}', None, "inputs must be a list of objects"),
        (json.dumps({"inputs": [{}] * 65}).encode(), None, "65 inputs; there may be 64 at most"),
        (b'{"inputs": []}', "99", "Inference-Header-Content-Length is '99'; it must be a number of bytes, and 14 came"),
        (b'{"inputs": []}', "-1", "Inference-Header-Content-Length is '-1'"),
        (b'{"inputs": []}abc', "14", "3 bytes follow that belong to no input"),
        (b'{"inputs": [], "parameters": 3}', None, "parameters must be an object"),
        (b'{"inputs": [], "outputs": [{}]}', None, "an output has no name"),
        (b'{"inputs": [], "outputs": [{"name": "y"}]}', None, "the model has no output 'y'; it has text_output"),
        (b'{"inputs": [], "outputs": [{"name": "y", "parameters": {"classification": 3}}]}', None,
         "an output's parameter 'classification' is not supported"),
        (b'{"inputs": [{"name": "x", "parameters": {"shared_memory_region": "r"}}]}', None,
         "shared memory is not taken"),
        (b'{"inputs": [{"name": "x", "datatype": "BYTES", "shape": [1], "data": [], "parameters": {"binary_data_size": 0}}'
         b"]}", None, "both data and binary_data_size"),
        (b'{"inputs": [{"name": "x", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 5}}]}',
         None, "binary_data_size is '5'; it must be a number of bytes, and 0 came"),
        (b'{"inputs": [{"name": "x", "datatype": "INT8", "shape": [1], "data": [1]}]}', None,
         "the model has no input 'x'; it has text_input"),
        (b'{"inputs": [{"name": "top_k", "datatype": "INT8", "shape": [2], "data": [1, 2]}]}', None,
         "top_k has 2 elements; it must have one"),
        (b'{"inputs": [{"name": "text_input", "datatype": "INT8", "shape": [1], "data": [1]}]}', None,
         "text_input has an element that is no text"),
        (b'{"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["\\ud800"]}]}', None,
         "text_input is not UTF-8"),
        (b'{"id": 3, "inputs": []}', None, "the id must be a text of at most 256 characters"),
        (b'{"inputs": [], "parameters": {"sequence_id": 3}}', None, "no state is kept between requests"),
        (b'{"inputs": [], "parameters": {"timeout": -1}}', None, "timeout must be a whole number of microseconds"),
        (b'{"inputs": [], "parameters": {"priority": 1e9}}', None, "priority must be a whole number of 32 bits"),
        (b'{"inputs": [{"name": "top_k", "datatype": "INT8", "shape": [1], "data": [1]}], "parameters": {"top_k": 1}}',
         None, "'top_k' is given twice"),
    ],
)  # fmt: skip
def test_bodies_that_are_refused(body: bytes, length: str | None, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("'", ".").replace("(", ".")):
        read_inference(body, length)


@given(body=st.binary(max_size=60), length=st.none() | st.text(max_size=6) | st.integers(-5, 70).map(str))
def test_any_body_is_read_or_refused(body: bytes, length: str | None) -> None:
    for read in (lambda: read_inference(body, length), lambda: read_generate(body, True), lambda: read_object(body)):
        assert refusal(read) != ""


FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "id": ANYTHING, "inputs": st.lists(
            st.fixed_dictionaries({}, optional={
                "name": st.sampled_from(sorted(signature.INPUTS)) | ANYTHING, "datatype": ANYTHING, "shape": ANYTHING,
                "data": ANYTHING, "parameters": st.fixed_dictionaries({}, optional={"binary_data_size": ANYTHING}),
            }), max_size=3) | ANYTHING,
        "outputs": ANYTHING, "parameters": st.dictionaries(st.sampled_from(sorted(signature.INPUTS)), ANYTHING) | ANYTHING,
    },
)  # fmt: skip


@given(asked=FIELDS, rest=st.binary(max_size=30), cut=st.integers(-3, 3))
def test_any_request_is_read_or_refused(asked: dict[str, Any], rest: bytes, cut: int) -> None:
    body, size = packed(asked, rest)
    for read in (lambda: read_inference(body, str(int(size) + cut)), lambda: read_generate(body[: int(size)], False)):
        assert len(refusal(read) or "") < 2000


def test_packed_bodies_are_unpacked_up_to_a_size() -> None:
    text = b"x" * 1000
    bare = zlib.compress(text, wbits=-15)
    assert inflate(text, "", 10) == text  # its size was looked at on the way in
    for encoding, body in (("gzip", gzip.compress(text)), ("deflate", zlib.compress(text))):
        assert inflate(body, encoding, 1000) == text
        with pytest.raises(ValueError, match="unpacks to more than 999 bytes"):
            inflate(body, encoding, 999)
        with pytest.raises(ValueError, match=f"not whole {encoding}"):
            inflate(body[:-3], encoding, 1000)
        with pytest.raises(ValueError, match=f"the body is not {encoding}"):
            inflate(b"no" + body, encoding, 1000)
    with pytest.raises(ValueError, match="the body is not deflate"):
        inflate(bare, "deflate", 1000)
    with pytest.raises(ValueError, match="no content-encoding 'br'"):
        inflate(text, "br", 1000)


def test_generate_takes_inputs_as_fields_and_as_parameters() -> None:
    call = read_generate(
        b'{"id": "1", "text_input": "a", "stop": "x", "parameters": {"stream": true, "temperature": 1}}', stream=False
    )
    assert call.stream
    assert call.settings == {"text_input": "a", "stop": ["x"], "stream": True, "temperature": 1.0}
    assert read_generate(b'{"text_input": "a"}', stream=True).stream
    with pytest.raises(ValueError, match=r"'stop' is given twice"):
        read_generate(b'{"stop": "x", "parameters": {"stop": "y"}}', stream=False)
    with pytest.raises(ValueError, match="temperature has an element that is no number"):
        read_generate(b'{"temperature": "hot"}', stream=False)
    with pytest.raises(ValueError, match="seed has an element that is no whole number"):
        read_generate(b'{"seed": 1.5}', stream=False)


def test_outputs_of_every_kind() -> None:
    top = ((5, -0.1), (6, -2.0))
    read = (None, TokenLogprob(3, -1.5, top))
    outputs = [
        Output("e", 0, (5,), "a", (TokenLogprob(5, -0.1, top),), prompt_logprobs=read),
        Output("e", 0, (6,), "b", (TokenLogprob(6, -2.0, top),), finish="stop"),
    ]
    found = {tensor.name: tensor for tensor in answer(outputs, None)}
    assert {name: tensor.values for name, tensor in found.items()} == {
        "text_output": [b"ab"], "output_ids": [5, 6], "finish_reason": [b"stop"], "logprobs": [-0.1, -2.0],
        "top_logprobs": [-0.1, -2.0, -0.1, -2.0], "top_ids": [5, 6, 5, 6],
        "prompt_logprobs": [-1.5], "top_prompt_logprobs": [-0.1, -2.0], "top_prompt_ids": [5, 6],
    }  # fmt: skip
    assert found["top_ids"].shape == (2, 2)
    for name, tensor in found.items():
        declared = signature.OUTPUTS[name]
        assert (tensor.datatype, len(tensor.shape)) == (declared.datatype, len(declared.shape))
    assert [tensor.name for tensor in answer(outputs[:1], ("finish_reason", "output_ids"))] == ["output_ids"]
    assert write_generate("", "m", "1", answer(outputs[:1], ("text_output", "output_ids"))) == {
        "model_name": "m", "model_version": "1", "text_output": "a", "output_ids": [5],
    }  # fmt: skip


def test_what_the_engine_is_asked() -> None:
    call = make_call("", (), {"top_k": 0, "stop": "x", "stop_token_ids": [3], "seed": 7})
    asked = call.sampling(eos=(1,))
    assert asked == {"max_tokens": 16, "seed": 7, "top_k": None, "stop": ("x",), "stop_ids": (3,), "eos": (1,)}
    assert make_call("", (), {"top_k": 4}).sampling(())["top_k"] == 4


def test_the_earlier_deadline_counts() -> None:
    now = time.monotonic()
    assert make_call("", (), {}).deadline is None
    assert make_call("", (), {"timeout": 0}).deadline is None
    for parameters, seconds in (({"timeout": 5_000_000}, 9.0), ({"timeout": 50_000_000}, 5.0)):
        deadline = make_call("", (), parameters, timeout=seconds).deadline
        assert deadline is not None
        assert 4.9 < deadline - now < 8


# -- messages ---------------------------------------------------------------------------------------------------------


def message(*inputs: dict[str, Any], **fields: Any) -> Any:
    return MESSAGES["ModelInferRequest"](model_name="m", inputs=inputs, **fields)


def test_elements_come_raw_or_in_fields() -> None:
    text = {"name": "text_input", "datatype": "BYTES", "shape": [1]}
    number = {"name": "temperature", "datatype": "FP32", "shape": [1, 1]}
    raw = message(text, number, raw_input_contents=[b"\x01\x00\x00\x00a", struct.pack("<f", 0.5)])
    fields = message(
        text | {"contents": {"bytes_contents": [b"a"]}}, number | {"contents": {"fp32_contents": [0.5]}}, id="x"
    )
    for one in (raw, fields):
        assert read_call(one, None).settings == {"text_input": "a", "temperature": 0.5}
    fields.parameters["max_tokens"].int64_param = 4
    fields.parameters["ignore_eos"].bool_param = True
    assert read_call(fields, None).settings["max_tokens"] == 4
    assert read_call(fields, None).settings["ignore_eos"] is True


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (message({"name": "top_k", "datatype": "INT32", "shape": [1]}, raw_input_contents=[b"1234", b""]),
         "raw_input_contents has 2 items for 1 inputs; all or none are raw"),
        (message({"name": "top_k", "datatype": "INT32", "shape": [1], "contents": {"int_contents": [1]}},
                 raw_input_contents=[b"1234"]), "has both contents and raw_input_contents"),
        (message({"name": "top_k", "datatype": "INT32", "shape": [1], "contents": {"int64_contents": [1]}}),
         "0 elements came; its shape has 1"),
        (message({"name": "top_p", "datatype": "FP16", "shape": [1]}), "FP16 comes in raw_input_contents only"),
        (message({"name": "top_p", "datatype": "BF16", "shape": [1]}), "no datatype 'BF16'"),
        (message({"name": "text_input", "datatype": "BYTES", "shape": [2], "contents": {"bytes_contents": [b""]}}),
         "the bytes are not 2 elements of BYTES"),
        (message(*[{"name": "top_k"}] * 65), "there may be 64 inputs and outputs at most"),
        (message({"name": "top_k", "parameters": {"shared_memory_region": {"string_param": "r"}}}),
         "'shared_memory_region' is not supported; elements come in the message: shared memory is not taken"),
        (message(outputs=[{"name": "y"}]), "the model has no output 'y'"),
    ],
)  # fmt: skip
def test_messages_that_are_refused(asked: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("'", ".")):
        read_call(asked, None)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    assert refusal(lambda: read_call(decode("ModelInferRequest", data), 1.0)) != ""


# -- what the model says of itself ------------------------------------------------------------------------------------


def test_metadata_and_config_agree() -> None:
    metadata = MESSAGES["ModelMetadataResponse"](**signature.metadata("m", "1"))
    config = MESSAGES["ModelConfigResponse"](config=signature.config("m", has_text=True)).config
    assert [(one.name, list(one.shape)) for one in metadata.inputs] == [(it.name, list(it.dims)) for it in config.input]
    assert [(one.name, list(one.shape)) for one in metadata.outputs] == [
        (it.name, list(it.dims)) for it in config.output
    ]
    assert [one.name for one in config.input if not one.optional] == ["text_input"]
    bare = MESSAGES["ModelConfigResponse"](config=signature.config("m", has_text=False)).config
    assert [one.name for one in bare.input if not one.optional] == ["input_ids"]


# -- keys and statistics ----------------------------------------------------------------------------------------------


def test_keys_are_tenants() -> None:
    assert Keys([]).tenant("") == ""
    keys = Keys(["one", "two"])
    assert keys.tenant("Bearer two") == "1"
    assert keys.tenant("bearer one") == "0"
    for wrong in ("", "one", "Basic one", "Bearer", "Bearer three", "Bearer öne"):
        with pytest.raises(HttpError, match="no valid API key came: send Authorization: Bearer KEY"):
            keys.tenant(wrong)


def test_requests_are_counted_by_how_they_ended() -> None:
    found = Statistics()
    with found.request() as clock:
        clock.read = clock.came + 1
        clock.began = clock.came + 3
    with pytest.raises(RefusedError), found.request():
        raise RefusedError("full", 1.0)
    with pytest.raises(ValueError, match="no"), found.request():
        raise ValueError("no")
    with pytest.raises(HttpError), found.request():
        raise HttpError(503, "dead", "engine_failed")
    with pytest.raises(GeneratorExit), found.request():
        raise GeneratorExit
    assert found.failures == {"REJECTED": 1, "OTHER": 1, "BACKEND": 1, "CANCELED": 1}
    assert (found.count["success"], found.count["fail"], found.count["queue"]) == (1, 4, 1)
    assert found.seconds["compute_input"] == pytest.approx(1)
    assert found.seconds["queue"] == pytest.approx(2)
    assert found.last > 0
