//! Files that are something else than their names say.

/// What files of other kinds begin with, and what they are.
const KINDS: [(&[u8], &str); 12] = [
    (b"version https://git-lfs", "a pointer of Git LFS in place of the file, which `git lfs pull` fetches"),
    (b"PK\x03\x04", "a zip file: unpack it, or, if it is a spreadsheet (.xlsx), save that as CSV"),
    (b"\x1f\x8b", "packed with gzip: unpack it (`gunzip`)"),
    (b"\xfd7zXZ", "packed with xz: unpack it (`unxz`)"),
    (b"\x28\xb5\x2f\xfd", "packed with Zstandard: unpack it (`unzstd`)"),
    (b"7z\xbc\xaf", "a 7-Zip archive: unpack it"),
    (b"Rar!\x1a\x07", "a RAR archive: unpack it"),
    (b"\xd0\xcf\x11\xe0", "an old Excel or Word file: save it as CSV"),
    (b"ARROW1", "an Arrow file: write it again as CSV"),
    (b"\x89HDF", "an HDF5 file, which is not read"),
    (b"\x93NUMPY", "an array of NumPy, which is not read"),
    (b"%PDF", "a PDF, which is not read"),
];

/// What web pages and other files of marks begin with, in lower case.
const PAGES: [&str; 7] = ["<!doctype", "<html", "<head", "<body", "<?xml", "<svg", "<error"];

/// What servers send in place of a file that they do not give, in lower case.
const REFUSALS: [&str; 6] =
    ["entry not found", "repository not found", "not found", "404: not found", "unauthorized", "invalid username or password."];

/// What a file is by its first bytes, and what to do with it, if that is a kind which is often taken for another one; `None` for all others.
pub(crate) fn other_kind(bytes: &[u8]) -> Option<String> {
    if let Some((_, what)) = KINDS.iter().find(|(start, _)| bytes.starts_with(start)) {
        return Some(what.to_string());
    }
    // Letters alone may be a text.
    if bytes.starts_with(b"PAR1") && bytes.iter().take(512).any(|byte| *byte < b'\t') {
        return Some(
            "a Parquet file: write it again as CSV, in Python with `pandas.read_parquet(…).to_csv(…, index=False)`".into(),
        );
    }
    if bytes.starts_with(b"BZh") && bytes.get(4..10) == Some(b"1AY&SY") {
        return Some("packed with bzip2: unpack it (`bunzip2`)".into());
    }
    if bytes.get(4..8) == Some(b"ftyp") {
        let what = match bytes.get(8..12) {
            Some(b"avif" | b"avis") => "an AVIF picture, which is not read: save it as JPEG or PNG",
            Some(b"heic" | b"heix" | b"heim" | b"heis" | b"hevc" | b"mif1" | b"msf1") => {
                "a HEIC photo, which is not read: save it as JPEG or PNG"
            }
            Some(b"crx ") => "a camera's raw file, which is not read: save it as JPEG or PNG",
            _ => "a video, which is not read",
        };
        return Some(what.into());
    }
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(512)]);
    let text = text.trim_start_matches('\u{feff}').trim_start();
    let lower = text.to_lowercase();
    if PAGES.iter().any(|page| lower.starts_with(page)) {
        let is_drawing = lower.contains("<svg") || lower.contains("<!doctype svg");
        return Some(match is_drawing {
            true => "an SVG drawing, which is not read: save it as PNG".into(),
            false => "a web page (HTML or XML) in place of the file: fetch the file again".into(),
        });
    }
    let is_refusal =
        REFUSALS.contains(&lower.trim_end()) || lower.starts_with("{\"error\":") || lower.starts_with("access to model ");
    (is_refusal && bytes.len() < 512).then(|| {
        let first: String = text.lines().next().unwrap_or_default().chars().take(80).collect();
        format!("what a server answered in place of the file (\"{first}\"): fetch the file again")
    })
}

#[cfg(test)]
mod tests {
    use super::other_kind;

    #[test]
    fn kinds_are_told_by_their_first_bytes() {
        for (bytes, part) in [
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 60\n" as &[u8], "`git lfs pull`"),
            (b"\xef\xbb\xbf \n<!DOCTYPE html><html>", "a web page"),
            (b"<?xml version=\"1.0\"?><svg width=\"3\">", "SVG"),
            (b"Entry not found", "(\"Entry not found\")"),
            (b"{\"error\":\"Access restricted\"}", "what a server answered"),
            (b"PK\x03\x04 and so on", "spreadsheet"),
            (b"\x1f\x8b\x08", "gunzip"),
            (b"BZh91AY&SY\x9f", "bunzip2"),
            (b"PAR1\x15\x04\x15", "Parquet"),
            (b"Rar!\x1a\x07\x01\0", "RAR"),
            (b"\0\0\0\x18ftypcrx ", "raw file"),
            (b"<?xml version=\"1.0\"?><!DOCTYPE svg PUBLIC>", "SVG"),
            (b"\0\0\0\x18ftypheic", "HEIC"),
            (b"\0\0\0\x18ftypavif", "AVIF"),
        ] {
            assert!(other_kind(bytes).is_some_and(|kind| kind.contains(part)), "{part}: {:?}", other_kind(bytes));
        }
        for bytes in [b"PAR1 and a kinase\n" as &[u8], b"BZh, said the bee\n", b"Rar!\n"] {
            assert_eq!(other_kind(bytes), None);
        }
        // Captions may begin as pages and refusals do.
        for bytes in [b"<3 dogs\n" as &[u8], b"404 on a door\n", b"Not found in the dark\n", b"Access to the beach\n"] {
            assert_eq!(other_kind(bytes), None);
        }
        for bytes in [b"" as &[u8], b"{}", b"path,caption\n", b"{\"model_cfg\": {}}", b"\x89PNG\r\n", b"\x80\x02}q\0."] {
            assert_eq!(other_kind(bytes), None);
        }
    }
}
