"""Run by the tests in the environment that has NVIDIA's client: sends requests, saves answers.

    client_script.py http|grpc ADDRESS MODEL QUESTIONS.json ANSWERS.npz

A question is {input: rows}. All are sent at once. The answer to number n is saved as "n", an error
as "error n".
"""

import importlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np

DTYPES = {"SEED": np.uint64, "CFG": np.float64, "TOP_P": np.float64, "TEMPERATURE": np.float64}
DTYPES |= {"PROMPT": np.object_, "NEGATIVE": np.object_}
TYPES = {"f": "FP64", "i": "INT64", "u": "UINT64", "O": "BYTES"}


def main(protocol: str, address: str, model: str, questions: str, answers: str) -> None:
    module = importlib.import_module(f"tritonclient.{protocol}")

    def ask(question: dict) -> tuple:
        inputs = []
        for name, rows in question.items():
            array = np.array(rows, DTYPES.get(name, np.int64))
            datatype = TYPES[array.dtype.kind]
            inputs.append(module.InferInput(name, list(array.shape), datatype))
            inputs[-1].set_data_from_numpy(array)
        client = module.InferenceServerClient(address)  # http: not for several threads
        try:
            return "", client.infer(model, inputs).as_numpy("IMAGE")
        except Exception as error:
            return "error ", str(error)
        finally:
            client.close()

    with open(questions) as stream:
        asked = json.load(stream)
    with ThreadPoolExecutor(len(asked)) as threads:
        found = list(threads.map(ask, asked))
    np.savez(answers, **{f"{kind}{n}": answer for n, (kind, answer) in enumerate(found)})


main(*sys.argv[1:])
