"""Read text files and CSV tables in the encodings and variants that editors and spreadsheets write."""

import codecs
import csv
import io

from utils.common.errors import UserError
from utils.common.files import read_file

DELIMITERS = ",;\t"     # of CSV files; spreadsheets choose one by the language of the system


def read_text(path, what):
    """Read a file in UTF-8 or, if it starts with a byte order mark of it, UTF-16.

    Args:
        path: of the file.
        what: description of the expected file, for error messages.

    Returns:
        Its text.

    Raises:
        UserError: if the file cannot be read or decoded.
    """
    data = read_file(path, what)
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected {what}, found: {error}; save it as UTF-8") from None


def read_csv(path, what):
    """Read a table with a header, separated by commas, semicolons or tabs. Lines that start with # may precede it.

    Args:
        path: of the file.
        what: description of the expected file, for error messages.

    Returns:
        The column names in lower case, and [(line number, {column: text})] of the rows that are not empty.

    Raises:
        UserError: if the file is not such a table.
    """
    text, skipped = read_text(path, what), 0
    while text.startswith("#") or text[:4].lower() == "sep=":       # comments; names the delimiter to Excel
        text, skipped = text.partition("\n")[2], skipped + 1
    first = text.partition("\n")[0]
    delimiter = max(DELIMITERS, key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        rows = [(reader.line_num + skipped, dict(zip(header, row, strict=False))) for row in reader if any(
            cell.strip() for cell in row)]
    except csv.Error as error:
        raise UserError(f"{path}: expected {what}, found: {error}") from None
    return header, rows
