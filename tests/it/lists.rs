//! Lists as people write them.

use std::{fs, path::PathBuf};

use burn_moe::clip::{
    checkpoint::ClipCheckpoint,
    lists::{CaptionedImages, Columns, ListError, ListOptions, lines_in},
};

fn read_with(name: &str, bytes: &[u8], options: &ListOptions) -> Result<CaptionedImages, String> {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join(name), bytes).unwrap();
    CaptionedImages::read(folder.path().join(name), options)
        .map_err(|error| error.to_string().replace(&format!("{}/", folder.path().display()), ""))
}

fn read(name: &str, bytes: &[u8], columns: &Columns) -> Result<CaptionedImages, String> {
    read_with(name, bytes, &ListOptions { columns: columns.clone(), split: None })
}

fn of_split(text: &str, split: Option<&str>) -> Result<CaptionedImages, String> {
    read_with("list", text.as_bytes(), &ListOptions { columns: Columns::default(), split: split.map(str::to_string) })
}

fn two_images() -> CaptionedImages {
    let captions = [("a cat, \"on\" a mat", 0), ("a cat", 0), ("a dog", 1)].map(|(caption, image)| (caption.to_string(), image));
    CaptionedImages { images: ["a.jpg", "b.jpg"].map(PathBuf::from).to_vec(), captions: captions.to_vec() }
}

#[test]
fn tables_of_every_usual_form_are_read() {
    let usual = Columns::default();
    for (name, text) in [
        ("list.csv", "path,caption\na.jpg,\"a cat, \"\"on\"\" a mat\"\na.jpg,a cat\nb.jpg,a dog\n"),
        ("list.CSV", "Path, Caption\na.jpg, \"a cat, \"\"on\"\" a mat\"\n a.jpg , a cat\nb.jpg,a dog"),
        ("list.tsv", "filepath\ttitle\na.jpg\t\"a cat, \"\"on\"\" a mat\"\na.jpg\ta cat\nb.jpg\ta dog\n"),
        ("list.csv", "filepath\ttitle\na.jpg\t\"a cat, \"\"on\"\" a mat\"\na.jpg\ta cat\nb.jpg\ta dog\n"),
        ("list.csv", "id;image;text\n1;a.jpg;\"a cat, \"\"on\"\" a mat\"\n2;b.jpg;a dog\n3;a.jpg;a cat\n"),
        ("results.csv", "image_name| comment_number| comment\na.jpg| 0| a cat, \"on\" a mat\na.jpg| 1| a cat\nb.jpg| 0| a dog\n"),
        ("captions.txt", "image,caption\na.jpg,\"a cat, \"\"on\"\" a mat\"\na.jpg,a cat\nb.jpg,a dog\n"),
        ("list.csv", "image,caption_1,caption_2\na.jpg,\"a cat, \"\"on\"\" a mat\",a cat\nb.jpg,,a dog\n"),
        ("list.csv", "img,raw\na.jpg,\"[\"\"a cat, \\\"\"on\\\"\" a mat\"\", \"\"a cat\"\"]\"\nb.jpg,a dog\n"),
        ("list.csv", "image,caption,caption.1\na.jpg,\"a cat, \"\"on\"\" a mat\",a cat\nb.jpg,,a dog\n"),
        ("list.csv", "sep=;\nimage;caption-1;caption-2\na.jpg;\"a cat, \"\"on\"\" a mat\";a cat\nb.jpg;;a dog\n"),
        // What spreadsheets write below and behind a table.
        ("list.csv", "image,caption\na.jpg,\"a cat, \"\"on\"\" a mat\"\na.jpg,a cat,\n,\nb.jpg,a dog,,\n,\n,\n"),
        (
            "list.csv",
            "\"image\",\"tags (many, mixed)\",\"caption\"\na.jpg,x,\"a cat, \"\"on\"\" a mat\"\na.jpg,x,a cat\nb.jpg,x,a dog\n",
        ),
        // A line of Kaggle's Flickr30k lacks a separator.
        ("results.csv", "image_name| comment_number| comment\na.jpg| 0| a cat, \"on\" a mat\na.jpg| 4   a cat\nb.jpg| 0| a dog\n"),
        ("list.csv", "  \npath,caption\n./a.jpg,\"a cat, \"\"on\"\" a mat\"\na.jpg,a cat\n.\\b.jpg,a dog\n"),
        (
            "coco.json",
            "{\"images\": [{\"id\": \"x1\", \"file_name\": \"a.jpg\"}, {\"id\": \"x2\", \"file_name\": \"b.jpg\"}], \"annotations\": \
             [{\"image_id\": \"x1\", \"caption\": \"a cat, \\\"on\\\" a mat\"}, {\"image_id\": \"x1\", \"caption\": \"a cat\"}, \
             {\"image_id\": \"x2\", \"caption\": \"a dog\"}]}",
        ),
        (
            "list.json",
            "[{\"image\": \"a.jpg\", \"captions\": [\"a cat, \\\"on\\\" a mat\", \"a cat\"]},\n {\"image\": \"b.jpg\", \"caption\": \"a dog\"}]",
        ),
        (
            "coco.json",
            "{\"images\": [{\"id\": 7, \"file_name\": \"a.jpg\"}, {\"id\": 3, \"file_name\": \"b.jpg\"}, {\"id\": 1, \"file_name\": \"none.jpg\"}],\n\
          \"annotations\": [{\"image_id\": 7, \"caption\": \"a cat, \\\"on\\\" a mat\", \"id\": 1}, {\"image_id\": 3, \"caption\": \"a dog\"}, \
          {\"image_id\": 7, \"caption\": \"a cat\"}]}",
        ),
        ("flickr.token", "a.jpg#0\ta cat, \"on\" a mat\na.jpg#1\ta cat\n\nb.jpg#0\ta dog \n"),
        (
            "list.jsonl",
            "{\"file_name\": \"a.jpg\", \"text\": \"a cat, \\\"on\\\" a mat\"}\n{\"file_name\": \"a.jpg\", \"text\": \"a cat\"}\n\n\
             {\"file_name\": \"b.jpg\", \"text\": \"a dog\", \"id\": 7}\n",
        ),
    ] {
        assert_eq!(read(name, text.as_bytes(), &usual).unwrap_or_else(|error| panic!("{text}: {error}")), two_images(), "{text}");
    }
    let numbered = Columns { image: Some("image #".into()), captions: Vec::new() };
    assert_eq!(read("list.tsv", b"image #\tcaption\na.jpg\tx\n", &numbered).unwrap().images, [PathBuf::from("a.jpg")]);
    assert_eq!(read("list.csv", b"\n", &usual).unwrap_err(), "list.csv: an empty file");
    let own = Columns { image: Some("Photo".into()), captions: vec!["alt".into()] };
    let found = read("list.csv", b"alt,caption,photo\na dog,x,b.jpg\n", &own).unwrap();
    assert_eq!(found.captions, [("a dog".to_string(), 0)]);
}

#[test]
fn splits_are_named_and_taken() {
    let karpathy = r#"{"images": [{"filename": "b.jpg", "filepath": "val2014", "split": "test", "sentences": [{"raw": "one"}, {"raw": "two"}]},
        {"filename": "c.jpg", "split": "train", "sentences": [{"raw": "no"}]},
        {"filename": "a.jpg", "split": "test", "sentences": [{"raw": "three"}]}], "dataset": "x"}"#;
    let table = "filepath,filename,raw,split\nval2014,b.jpg,one,test\nval2014,b.jpg,two,test\n,c.jpg,no,train\n,a.jpg,three,test\n";
    for text in [karpathy, table] {
        let test = of_split(text, Some("test")).unwrap();
        assert_eq!(test.images, ["val2014/b.jpg", "a.jpg"].map(PathBuf::from));
        let captions = [("one", 0), ("two", 0), ("three", 1)].map(|(caption, image)| (caption.to_string(), image));
        assert_eq!(test.captions, captions);
        assert_eq!(of_split(text, Some("all")).unwrap().images.len(), 3);
        assert_eq!(of_split(text, None).unwrap_err(), "list: the list holds the splits test, train: name one of them, or `all`");
        assert_eq!(of_split(text, Some("val")).unwrap_err(), "list: no split `val`: the list holds test, train");
    }
    let without = "path,caption\na.jpg,x\n";
    assert_eq!(of_split(without, Some("test")).unwrap_err(), "list: the list names no splits, and `test` is asked for");
}

#[test]
fn images_of_a_published_split_are_kept_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let names = folder.path().join("test.txt");
    let list = || of_split("image,caption\nimages/1.jpg,one\nimages/2.jpg,two\nimages/3.jpg,three\n", None).unwrap();
    for text in ["3.jpg\n1.jpg\n", "1\n3\n", "images/1.jpg\r\n3\r\n", "images\\1.jpg\n./images/3.jpg\n"] {
        fs::write(&names, text).unwrap();
        let mut kept = list();
        kept.keep_named(&names).unwrap();
        assert_eq!(kept.images, ["images/1.jpg", "images/3.jpg"].map(PathBuf::from));
        assert_eq!(kept.captions, [("one".to_string(), 0), ("three".to_string(), 1)]);
    }
    fs::write(&names, "1\n7.jpg\n8.jpg\n").unwrap();
    let mut kept = list();
    let error = kept.keep_named(&names).unwrap_err().to_string();
    assert!(error.ends_with("2 names are not in the list of images: 7.jpg, 8.jpg"), "{error}");
    assert_eq!(kept, list());
}

#[test]
fn lists_written_by_windows_and_spreadsheets_are_read() {
    let utf16 = |text: &str, bytes: fn(u16) -> [u8; 2]| -> Vec<u8> { text.encode_utf16().flat_map(bytes).collect() };
    let text = "\u{feff}path\tcaption\r\nimages\\a.jpg\tein B\u{e4}r\r\n";
    for bytes in [utf16(text, u16::to_le_bytes), utf16(text, u16::to_be_bytes), text.as_bytes().to_vec()] {
        let found = read("list.txt", &bytes, &Columns::default()).unwrap();
        assert_eq!(found.captions, [("ein B\u{e4}r".to_string(), 0)]);
        let expected = if cfg!(windows) { "images\\a.jpg" } else { "images/a.jpg" };
        assert_eq!(found.images, [PathBuf::from(expected)]);
    }
}

#[test]
fn texts_that_no_editor_wrote_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("texts.txt");
    let read = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        lines_in(&path).map_err(|error| error.to_string().replace(&format!("{}/", folder.path().display()), ""))
    };
    let utf16: Vec<u8> = "cat\ndog\n".encode_utf16().flat_map(u16::to_le_bytes).collect();
    assert_eq!(read(&utf16).unwrap(), ["cat", "dog"]);
    assert_eq!(read("\u{feff}cat\n\u{feff}dog\n".as_bytes()).unwrap(), ["cat", "dog"]);
    assert_eq!(read(&utf16[..15]).unwrap_err(), "texts.txt: no whole UTF-16: save the file as UTF-8");
    assert_eq!(
        read(&"\u{feff}cat\n".chars().flat_map(|c| (c as u32).to_le_bytes()).collect::<Vec<u8>>()).unwrap_err(),
        "texts.txt: line 1 holds a zero byte, which no text has: save the file as UTF-8"
    );
    assert!(read(b"cat\ndo\0g\n").unwrap_err().starts_with("texts.txt: line 2 holds a zero byte"));
    for empty in [b"" as &[u8], b"\n\n", b"\xef\xbb\xbf"] {
        assert_eq!(read(empty).unwrap_err(), "texts.txt: an empty file: a text is expected in every line");
    }
    for (bytes, expected) in [
        (b"PAR1\x15\x04" as &[u8], "texts.txt: it is a Parquet file: write it again as CSV"),
        (b"PK\x03\x04\x14\0", "texts.txt: it is a zip file: unpack it, or, if it is a spreadsheet (.xlsx), save that as CSV"),
        (b"\x1f\x8b\x08\0", "texts.txt: it is packed with gzip: unpack it"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "texts.txt: it is a pointer of Git LFS"),
    ] {
        let error = read(bytes).unwrap_err();
        assert!(error.starts_with(expected), "{error}");
    }
}

#[test]
fn columns_of_paths_and_of_folders_are_told_apart() {
    let images = |text: &str| of_split(text, None).unwrap().images;
    assert_eq!(images("filepath,filename,caption\nimages/a.jpg,a.jpg,x\n"), [PathBuf::from("images/a.jpg")]);
    assert_eq!(images("filepath,filename,caption\nimages,a.jpg,x\n"), [PathBuf::from("images/a.jpg")]);
    // A field `images` that is no list of objects is a column like any other.
    let columns = Columns { image: Some("images".into()), captions: Vec::new() };
    let error = read("flickr.token", b"a.jpg#0\tx\n", &columns).unwrap_err();
    assert_eq!(error, "flickr.token: a published list, which has no columns to name");
    let found = read("list.jsonl", b"{\"images\": \"a.jpg\", \"text\": \"x\"}\n", &columns).unwrap();
    assert_eq!(found.images, [PathBuf::from("a.jpg")]);
}

#[test]
fn no_row_is_lost_in_an_open_quote_or_a_list_of_python() {
    let error = |text: &str| of_split(text, None).unwrap_err();
    let open = "path\tcaption\na.jpg\t\"hello\nb.jpg\tdog\nc.jpg\tcat\n";
    assert_eq!(error(open), "list: line 2: a quote opens a field that does not end");
    let behind = "path,caption\na.jpg,x\nb.jpg,\"Hi,\" he said\n";
    assert_eq!(error(behind), "list: line 3: a quoted field goes on behind its end; write a quote inside of it twice");
    // A quote inside of a field is one like any other letter.
    assert_eq!(of_split("path,caption\na.jpg,he said \"Hi\"\n", None).unwrap().captions[0].0, "he said \"Hi\"");
    let python = "path,caption\na.jpg,\"['A man.', 'Two men.']\"\n";
    assert!(
        error(python).starts_with("list: line 2: captions as a list of Python; write them as a JSON list"),
        "{}",
        error(python)
    );
}

#[test]
fn no_caption_is_lost_without_a_word() {
    let error = |text: &str| of_split(text, None).unwrap_err();
    for (text, expected) in [
        (r#"{"image": "a.jpg", "captions": ["a", 5]}"#, "list: line 1: `captions`: 5 is in a list of texts: expected a text"),
        (
            r#"[{"image": "a.jpg", "captions": ["a"]}, {"image": "b.jpg", "captions": ["a", {"raw": "b"}]}]"#,
            "list: entry 2: `captions`: {\"raw\":\"b\"} is in a list of texts: expected a text",
        ),
        (
            "{\n \"data\": [{\"image\": \"a.jpg\", \"caption\": \"x\"}]\n}\n",
            "list: one JSON object, with the fields `data`: expected a JSON list of objects, or an object in every line",
        ),
        (r#"{"image": "a.jpg", "caption": 5}"#, "list: line 1: `caption`: 5 is no text: expected one, or a list of them"),
        (r#"{"image": "a.jpg", "caption": null}"#, "list: line 1: no caption"),
        ("image,caption\na.jpg,\"[\"\"a\"\", 5]\"\n", "list: line 2: 5 is in a list of texts: expected a text"),
        ("path,path,caption\na.jpg,b.jpg,x\n", "list: `path` is there twice among the columns of its first line: keep one of them"),
        (
            r#"{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}], "annotations": []}"#,
            "list: two images have the `id` 1: captions could belong to either",
        ),
        (
            r#"{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "caption": "x"}, {"image_id": 1, "caption": null}]}"#,
            "list: annotation 2 (of image 1) has no `caption`: remove it",
        ),
        ("a|number|caption\n", "list: the columns of its first line are `a`, `number`, `caption`; expected one of "),
        ("image|number|caption\na.jpg|x y\n", "list: line 2: 2 columns, but the first line has 3"),
        ("image|caption_1|caption_2\na.jpg|2 dogs play\n", "list: line 2: 2 columns, but the first line has 3"),
        ("image|caption|split\na.jpg|3 men\n", "list: line 2: 2 columns, but the first line has 3"),
        ("path,caption,split,split\na.jpg,x,train,test\n", "list: `split` is there twice among the columns"),
        (
            r#"{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "bbox": [1]}]}"#,
            "list: its annotations have no `caption`, as those of `instances_….json`",
        ),
    ] {
        assert!(error(text).starts_with(expected), "{}", error(text));
    }
    let twice = error(r#"{"image": "a.jpg", "caption": "a", "caption": "b"}"#);
    assert!(twice.contains("line 1: ") && twice.contains("`caption` is there twice"), "{twice}");
    let counted = of_split(r#"{"image": "a.jpg", "caption": "x", "split": 1}"#, Some("1")).unwrap();
    assert_eq!(counted.images, [PathBuf::from("a.jpg")]);
    let images = of_split("path,caption\nimg/train\\a.jpg,x\nimg//train/a.jpg,y\n", None).unwrap().images;
    assert_eq!(images, [PathBuf::from("img/train/a.jpg")]);
}

#[test]
fn lists_of_another_kind_are_named() {
    let error = |text: &str| of_split(text, None).unwrap_err();
    assert_eq!(error("b.jpg#0\tone\nb.jpg two\n"), "list: line 2: expected `NAME#NUMBER`, a tab and a caption");
    let text = error(r#"{"images": [], "annotations": [{"image_id": 5, "caption": "x"}]}"#);
    assert_eq!(text, "list: a caption names image 5, which is not there");
    assert_eq!(error("../secret.jpg#0\tx"), "list: ../secret.jpg is not inside the folder of images");
    assert!(error("{\"images\": [{\"id\": 1}]}").ends_with("an image without `filename`, and no `annotations`"));
    assert!(error("[{\"image\": \"a.jpg\"}]").starts_with("list: entry 1: its fields are `image`; expected one of path, "));
}

#[test]
fn what_is_wrong_in_a_table_is_named() {
    let error = |bytes: &[u8]| read("list.csv", bytes, &Columns::default()).unwrap_err();
    let text = error(b"photo,words\nb.jpg,a dog\n");
    assert!(text.starts_with("list.csv: the columns of its first line are `photo`, `words`; expected one of path, "), "{text}");
    assert_eq!(error(b"path,caption\nb.jpg,a \xe9\n"), "list.csv: line 2 is no UTF-8: save the file in this encoding");
    assert_eq!(error(b"path,caption\n,a dog\n"), "list.csv: line 2: no image");
    assert_eq!(error(b"path,caption\n"), "list.csv: no image with a caption");
    let text = read("x", b"{\"path\": \"a\"\n", &Columns::default()).unwrap_err();
    assert!(text.starts_with("x: line 1: not the JSON that was expected: "), "{text}");
}

/// A byte order mark, line ends of Windows, a last line without an end and blanks at the ends of lines change nothing, whichever file it is.
#[test]
fn how_an_editor_saved_a_list_changes_nothing() {
    type Reader = fn(PathBuf) -> Result<String, ListError>;
    fn debug<T: std::fmt::Debug>(value: T) -> String {
        format!("{value:?}")
    }
    const LIST: Reader =
        |path| CaptionedImages::read(path, &ListOptions { split: Some("all".into()), ..ListOptions::default() }).map(debug);
    let configuration: Reader = |path| {
        let folder = path.with_file_name("checkpoint");
        fs::create_dir_all(&folder).unwrap();
        fs::copy(&path, folder.join("config.json")).unwrap();
        fs::copy(&path, folder.join("preprocessor_config.json")).unwrap();
        Ok(debug(ClipCheckpoint::read_config(&folder).unwrap_or_else(|error| panic!("{error}"))))
    };
    let readers: [(&str, &str, Reader); 9] = [
        ("configuration", "{\"vision_config\": {},\n\"text_config\": {},\n\"image_mean\": 0.5}\n", configuration),
        ("table", "path,caption,split\na.jpg,a cat,x\nb.jpg,a dog,y\n", LIST),
        ("json lines", "{\"path\": \"a.jpg\", \"caption\": \"a cat\"}\n{\"path\": \"b.jpg\", \"caption\": \"a dog\"}\n", LIST),
        ("json list", "[{\"path\": \"a.jpg\", \"caption\": \"a cat\"},\n{\"path\": \"b.jpg\", \"caption\": \"a dog\"}]\n", LIST),
        (
            "coco",
            "{\"images\": [{\"id\": 1, \"file_name\": \"a.jpg\"}],\n\"annotations\": [{\"image_id\": 1, \"caption\": \"a cat\"}]}\n",
            LIST,
        ),
        (
            "karpathy",
            "{\"images\":\n[{\"filename\": \"a.jpg\", \"split\": \"test\", \"sentences\": [{\"raw\": \"a cat\"}]}]}\n",
            LIST,
        ),
        ("flickr30k", "a.jpg#0\ta cat\nb.jpg#0\ta dog\n", LIST),
        ("lines", "a cat\na dog\n", |path| lines_in(path).map(debug)),
        ("names", "a\nb\n", |path| {
            let mut list = CaptionedImages { images: vec!["a.jpg".into(), "b.jpg".into()], captions: Vec::new() };
            list.keep_named(path).map(|()| debug(list))
        }),
    ];
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("list");
    for (name, text, reader) in readers {
        let run = |text: String| {
            fs::write(&path, text).unwrap();
            reader(path.clone()).unwrap_or_else(|error| panic!("{name}: {error}"))
        };
        let expected = run(text.to_string());
        for saved in [
            format!("\u{feff}{text}"),
            text.replace('\n', "\r\n"),
            text.trim_end().to_string(),
            text.replace('\n', "\r"),
            text.replace('\n', "  \n"),
            format!("\u{feff}{}", text.trim_end().replace('\n', " \r\n")),
        ] {
            assert_eq!(run(saved.clone()), expected, "{name}: {saved:?}");
        }
    }
}
